"""What `benchmarks/gpu.sh` does: parts that each fill a section of one JSON file and of one markdown page.

A part that fails says so in both, the others go on, and the exit status is 1. Needs torch, DeepSpeed and this package,
no Ray. Every throughput is measured in a process of its own by `sid-ray bench`, with a random teacher.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Rows = list[dict[str, Any]]

PRESETS = {"cifar10-uncond": 128, "cifar10-cond": 128, "ffhq64": 64, "afhqv2-64": 64, "imagenet64": 32}
"""Micro-batches to measure with."""
SWITCHES: dict[str, list[str]] = {
    "bf16": ["--engine.precision", "bf16"],
    "bf16, channels last": ["--engine.precision", "bf16", "--engine.channels_last", "true"],
    "bf16, shared latents": ["--engine.precision", "bf16", "--method.latents", "shared"],
    "bf16, lean": ["--engine.precision", "bf16", "--method.memory", "lean"],
    "bf16, minimal": ["--engine.precision", "bf16", "--method.memory", "minimal"],
    "bf16, checkpointing": ["--engine.precision", "bf16", "--engine.activation_checkpointing", "true"],
    "bf16, compiled": ["--engine.precision", "bf16", "--engine.compile", "true"],
    "fp32": ["--engine.precision", "fp32"],
}


def machine(device: str) -> Rows:
    """What this was measured on."""
    import deepspeed

    row = {"torch": torch.__version__, "deepspeed": deepspeed.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"gpu": properties.name, "memory_gb": f"{properties.total_memory / 1e9:.1f}", "cuda": torch.version.cuda}
    return [row]


def golden_networks(device: str, quick: bool) -> Rows:
    """The reference implementation's outputs of four networks, in float32 and in bf16."""
    from tests.golden_numbers import NETWORKS, golden_denoiser, load_golden

    rows = []
    for name in NETWORKS[: 2 if quick else None]:
        numbers, meta = load_golden(f"networks/{name}")
        network = golden_denoiser(numbers, meta["init_kwargs"], "net.").to(device).eval()
        inputs = [numbers[key].to(device) if key in numbers else None for key in ("x", "sigma", "labels")]
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            with torch.no_grad():
                output = network.to(dtype)(*inputs).cpu()
            expected = numbers["denoised"]
            error = (output - expected).abs().max() / expected.abs().max()
            rows.append({"network": name, "precision": precision, "largest relative error": float(error)})
            limit = 1e-4 if precision == "fp32" else 5e-2
            rows[-1]["within"] = f"{limit:g}: {'yes' if error <= limit else 'NO'}"
    return rows


def golden_trajectories(device: str, quick: bool) -> Rows:
    """The reference implementation's losses over a few iterations, through DeepSpeed's engines."""
    from safetensors.torch import load_file

    from tests.engine_worker import replay
    from tests.golden_numbers import TRAJECTORIES, load_golden

    rows = []
    for name in TRAJECTORIES[: 1 if quick else None]:
        for stage in (1,) if quick else (0, 1, 2, 3):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "end.safetensors"
                replay(name, out, zero_stage=stage, micro_batch=8)
                losses = load_file(out)["losses"].cpu()
            numbers, meta = load_golden(f"sid/{name}")
            expected = torch.stack(
                [
                    torch.stack([numbers[f"iter{step}.{role}.loss"][0] for role in ("fake", "generator")])
                    for step in range(meta["iterations"])
                ]
            )
            error = float(((losses - expected).abs() / expected.abs().clamp(min=1e-3)).max())
            within = f"1e-3: {'yes' if error <= 1e-3 else 'NO'}"
            row = {"trajectory": name, "stage": stage, "largest relative error of a loss": error}
            rows.append(row | {"within": within})
    return rows


def precision(device: str, quick: bool) -> Rows:
    """The generator's gradient field in bf16 against float32, at a fake score that has and has not left the teacher."""
    from sid_ray.methods.sid import generator_gradient, generator_sigma
    from sid_ray.teachers.sources import load_denoiser

    torch.manual_seed(0)
    teacher = load_denoiser("builtin:digits")[0].to(device).requires_grad_(False)
    n = 16 if quick else 256
    images = torch.rand(n, *teacher.image_shape, device=device) * 2 - 1
    sigma, noise = generator_sigma(torch.rand(n, device=device)), torch.randn_like(images)
    rows = []
    for away in (1e-3, 1e-2, 1e-1):
        fake_score = load_denoiser("builtin:digits")[0].to(device).requires_grad_(False)
        for p in fake_score.parameters():
            p.add_(torch.randn_like(p) * p.abs().mean() * away)
        fields: list[Tensor] = []
        for dtype in (torch.float32, torch.bfloat16):
            a, b = teacher.to(dtype), fake_score.to(dtype)
            fields.append(generator_gradient(images, sigma, noise, a, b, alpha=1.0).gradient)
            teacher, fake_score = a.float(), b.float()
        exact, rounded = (field.flatten(1) for field in fields)
        cosine = torch.nn.functional.cosine_similarity(exact, rounded).median()
        rows.append({"fake score's distance from the teacher": away, "median cosine of bf16 and fp32": float(cosine)})
    return rows


def throughput(device: str, quick: bool) -> Rows:
    """`sid-ray bench` of the presets' networks at each switch."""
    presets = {"digits": 8} if quick else PRESETS
    switches = dict(list(SWITCHES.items())[:1]) if quick else SWITCHES
    rows = []
    for preset, images in presets.items():
        for name, options in switches.items():
            row: dict[str, Any] = {"preset": preset, "switches": name}
            sizes = ["--batch.size", str(images), "--engine.micro_batch", str(images), "--teacher.random", "true"]
            rows.append(row | _bench(preset, [*sizes, *options], device, quick))
    return rows


def _bench(preset: str, options: list[str], device: str, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        repeat = ["--repeat", "1", "--warm-up", "0"] if quick else ["--repeat", "10", "--warm-up", "5"]
        command = [sys.executable, "-m", "sid_ray", "bench", preset, "--json", str(file), *repeat, *options]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return {"failed": (done.stderr.strip().splitlines() or ["?"])[-1]}
        report = json.loads(file.read_text())
    return {
        "micro-batch": report["settings"]["micro_batch"],
        "ms": 1000 * report["seconds"]["median"],
        "images/s": report["images_per_second"],
        "TFLOP/s": report["flops_per_second"] / 1e12,
        "of the matrix peak": report["flops_per_second"] / report["peak_flops_per_second"],
        "peak GB": report["peak_memory"] / 1e9,
        **{f"{phase}, ms": 1000 * spread["median"] for phase, spread in report["phases"].items()},
    }


def memory(device: str, quick: bool) -> Rows:
    """`engine.micro_batch auto`: what it chooses for this device, and whether that fits."""
    rows = []
    for preset in ["digits"] if quick else list(PRESETS):
        options = ["--engine.micro_batch", "auto", "--teacher.random", "true", "--engine.precision", "bf16"]
        if quick:
            options += ["--batch.size", "8"]
        rows.append({"preset": preset} | _bench(preset, options, device, True))
    return rows


def forwards(device: str, quick: bool) -> Rows:
    """A frozen forward pass: eager, channels last, compiled, and compiled with CUDA graphs."""
    from sid_ray.config import load_config
    from sid_ray.teachers.model_directory import ModelConfig, read_model_config
    from sid_ray.teachers.public import public_teacher

    rows = []
    for preset, images in ({"digits": 8} if quick else PRESETS).items():
        public = public_teacher(load_config(preset).teacher.path)
        model = ModelConfig(kind="teacher", network=public.network) if public else read_model_config("builtin:digits")
        network = model.build().to(device, torch.bfloat16).eval().requires_grad_(False)
        x, sigma = torch.randn(images, *network.image_shape, device=device), torch.ones(images, device=device)
        ways: dict[str, Callable[[], Tensor]] = {
            "eager": partial(network, x, sigma),
            "channels last": partial(network, x.to(memory_format=torch.channels_last), sigma),
        }
        if not quick:
            ways["compiled"] = partial(torch.compile(network, dynamic=False), x, sigma)
            graphs = torch.compile(network, dynamic=False, mode="reduce-overhead")
            ways["compiled, CUDA graphs"] = partial(graphs, x, sigma)
        for name, call in ways.items():
            rows.append({"preset": preset, "images": images, "way": name, "ms": 1000 * _seconds(call, device, quick)})
    return rows


@torch.no_grad()
def _seconds(call: Callable[[], Tensor], device: str, quick: bool) -> float:
    """Best of some repetitions, after as many to warm up."""
    best = float("inf")
    for number in range(2 if quick else 20):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if number >= (1 if quick else 10):
            best = min(best, time.perf_counter() - started)
    return best


PARTS: dict[str, Callable[[str, bool], Rows]] = {
    "Golden networks": golden_networks,
    "Golden trajectories": golden_trajectories,
    "bf16 against float32": precision,
    "Throughput": throughput,
    "Largest micro-batch": memory,
    "A frozen forward pass": forwards,
}


def page(results: dict[str, Rows | str]) -> str:
    """All sections as markdown tables."""
    lines = ["# On a GPU: `benchmarks/gpu.sh`", ""]
    for title, rows in results.items():
        lines += [f"## {title}", ""]
        if isinstance(rows, str):
            lines += ["```", rows.strip(), "```", ""]
            continue
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def main() -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="Small, to see that everything runs.")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; try --device cpu --quick")
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    given.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Rows | str] = {"Machine": machine(given.device)}
    failed = False
    for title, part in PARTS.items():
        print(f"{title} ...", flush=True)
        try:
            results[title] = part(given.device, given.quick)
        except Exception:  # whatever it is, the other parts are worth having
            results[title], failed = traceback.format_exc(), True
            print(results[title], file=sys.stderr)
        (given.folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (given.folder / "gpu.md").write_text(page(results), encoding="utf-8")
    print(f"{given.folder / 'gpu.json'}, {given.folder / 'gpu.md'}")
    rows = [row for section in results.values() if not isinstance(section, str) for row in section]
    return int(failed or any("failed" in row or row.get("within", "").endswith("NO") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
