"""What a FID of many images costs, part by part, and what features in bf16 would change.

    python -m benchmarks.fid [MODEL] [--num 50000] [--batches 250,1000,4000] [--threads 2] [--json FILE]

MODEL: a one-step generator's directory; without one, the untrained generator of the built-in digits. The images are
the same for every batch and precision. Features in bf16: the network's weights and its input in bf16, its features and
all statistics in float32 and float64 as always.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sid_ray.evaluation.feature_network import FeatureNetwork
from sid_ray.evaluation.features import load_features
from sid_ray.evaluation.fid import frechet_distance, image_statistics, one_step_sampler, quantise
from sid_ray.evaluation.statistics import load_reference
from sid_ray.teachers.model_directory import load_model

PRESET_SIGMA = 2.5
"""Noise level of a generator that is not trained yet."""


class InBf16(nn.Module):
    """The digits features computed in bf16: uint8 images -> float32 features."""

    def __init__(self, features: FeatureNetwork):
        super().__init__()
        self.features = features.to(torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 (N, d) of uint8 images (N, C, H, W)."""
        return self.features.from_unit_range((images.float() / 127.5 - 1).bfloat16()).float()  # type: ignore[operator]


def seconds(action: Any) -> tuple[float, Any]:
    """How long it takes, and what comes of it."""
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def measure(model: str, num: int, batch: int) -> dict[str, float]:
    """Seconds of each part at one batch size, and the FID with features in float32 and in bf16."""
    denoiser, config = load_model(model)
    sample = one_step_sampler(denoiser.eval(), config.sigma_init or PRESET_SIGMA, seed=0)
    starts = range(0, num, batch)
    generating, images = seconds(lambda: torch.cat([quantise(sample(range(a, min(a + batch, num)))) for a in starts]))
    row = {"batch": batch, "images": generating}
    reference = load_reference("builtin:digits")
    for precision in ("fp32", "bf16"):
        features: Any = load_features("digits", denoiser.image_shape, "")
        network = features if precision == "fp32" else InBf16(features)
        row[f"features {precision}"], statistics = seconds(lambda n=network: image_statistics(images, n, batch))
        row["distance"], row[f"FID {precision}"] = seconds(lambda s=statistics: frechet_distance(s, reference))
    return row


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin:digits")
    parser.add_argument("--num", type=int, default=50_000)
    parser.add_argument("--batches", default="250,1000,4000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [measure(given.model, given.num, int(batch)) for batch in given.batches.split(",")]
    if given.json:
        given.json.write_text(json.dumps({"num": given.num, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print("| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
