"""The networks of EDM's teachers, by name."""

from sid_ray.diffusion.networks.dhariwal_unet import DhariwalUNet
from sid_ray.diffusion.networks.song_unet import SongUNet

NETWORKS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}

__all__ = ["NETWORKS", "DhariwalUNet", "SongUNet"]
