"""`python -m sid_ray` is `sid-ray`."""

from sid_ray.cli import main

main()
