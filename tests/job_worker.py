"""Runs configurations one after the other in one process group, as `sid_ray.training.worker` runs one."""

import sys

from sid_ray.training.worker import main

if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(path)
