"""What the process that ranks are forked from imports; see tests/ranks.py.

All that a run imports on its way, too: together as much time as all the rest of a short one.
"""

import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from matplotlib.backends import backend_agg  # noqa: F401

from sid_ray.training import worker  # noqa: F401
from sid_ray.training.engines import import_deepspeed

import_deepspeed()
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: E402, F401
