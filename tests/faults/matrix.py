"""The fault matrix as a table: `python -m tests.faults.matrix FOLDER [--faults NAME ...] [--stages N ...]`.

One line per cell as it ends; the same command goes on after the cells that are done (`FOLDER/cells.jsonl`), and the
table at the end is that of docs/results/faults.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from tests.faults.harness import FAULTS, STAGES, Cell, job, run_cell, undisturbed


def main() -> None:
    """Run the cells that are not done, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS)
    parser.add_argument("--stages", nargs="*", type=int, default=STAGES, choices=STAGES)
    chosen = parser.parse_args()
    folder = chosen.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "cells.jsonl"
    done = [Cell(**json.loads(line)) for line in log.read_text().splitlines()] if log.is_file() else []
    failed = 0
    for stage in chosen.stages:
        whole = folder / f"undisturbed-{stage}"
        if not (whole / "runs" / "digits" / "summary.json").is_file():
            shutil.rmtree(whole, ignore_errors=True)
            undisturbed(whole, job(stage))
        for fault in chosen.faults:
            if any((cell.fault, cell.stage) == (fault, stage) for cell in done):
                continue
            place = folder / f"{fault.replace(' ', '-')}-{stage}-{time.strftime('%H%M%S')}"
            try:
                cell = run_cell(fault, stage, place, whole / "runs" / "digits")
            except Exception as error:
                failed += 1
                (folder / f"{place.name}.failed").write_text(f"{type(error).__name__}: {error}")
                print(f"FAILED  ZeRO-{stage}  {fault}: {type(error).__name__}; see {place}.failed", flush=True)
                continue
            done.append(cell)
            with log.open("a") as file:
                file.write(json.dumps(asdict(cell)) + "\n")
            print(f"bitwise equal  ZeRO-{stage}  {fault}: {cell.lost_images} images repeated", flush=True)
    print(table(done))
    raise SystemExit(1 if failed else 0)


def table(cells: list[Cell]) -> str:
    """Markdown: a row per fault, a column per stage; what was trained again, of those that ended bitwise equal."""
    lost = {(cell.fault, cell.stage): cell.lost_images for cell in cells}
    rows = [
        f"| {fault} | " + " | ".join(_shown(lost.get((fault, stage))) for stage in STAGES) + " |" for fault in FAULTS
    ]
    heads = " | ".join(f"ZeRO-{stage}" for stage in STAGES)
    return "\n".join([f"| fault | {heads} |", "|---|" + "---|" * len(STAGES), *rows])


def _shown(lost: int | None) -> str:
    return "not run" if lost is None else f"equal, {lost} images repeated"


if __name__ == "__main__":
    main()
