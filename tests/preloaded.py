"""What the process that ranks are forked from imports; see tests/ranks.py."""

from sid_ray.training import worker  # noqa: F401
from sid_ray.training.engines import import_deepspeed

import_deepspeed()
