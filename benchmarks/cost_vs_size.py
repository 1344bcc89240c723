"""What an iteration costs as a run grows: images a prompt, prompts, steps, microbatch, devices.

    python benchmarks/cost_vs_size.py --output runs/sizes

Each line is a short run of the preset `demo` on this machine that learns from all of its images;
the exponent e of seconds ∝ sizeᵉ is fitted to a line's times by least squares of the logarithms: 1
is linear. Devices are virtual ones of the CPU, which share its cores: the same work, divided.
Results are kept in a record (`--record`) of runs with the same flags and iterations, and what is in
it is not run again; nor is a run that finished. One that was interrupted is begun anew, since going
on compiles in the midst of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_grpo.config import load_config

FLAGS = (
    *("--grpo.best-and-worst", "None", "--eval.num-prompts", "8", "--eval.num-steps", "2"),
    *("--run.report", "False", "--run.tensorboard", "off", "--run.sample-every", "0"),
    *("--run.save-every", "0", "--eval.keep-best", "False", "--grpo.beta", "0"),
)

# What grows → size → flags after `train demo`.
SIZES: dict[str, dict[int, tuple[str, ...]]] = {
    "images a prompt (of 8 prompts)": {
        n: ("--rollout.images-per-prompt", str(n)) for n in (4, 8, 16, 32)
    },
    "prompts (of 16 images)": {
        n: ("--rollout.prompts-per-iteration", str(n)) for n in (2, 4, 8, 16)
    },
    "denoising steps, all but the first and the last learned from": {
        n: ("--rollout.num-steps", str(n), "--rollout.window-size", str(n - 2))
        for n in (5, 10, 20, 40)
    },
    "images at a time (of 128)": {
        n: ("--rollout.microbatch", str(n), "--grpo.microbatch", str(n)) for n in (8, 16, 32, 64)
    },
    "devices (of one CPU)": {n: ("--mesh.data", str(n)) for n in (1, 2, 4, 8)},
}
DEVICES = "devices (of one CPU)"


def run(directory: Path, words: Sequence[str], devices: int) -> None:
    """Do the run, unless it is there.

    Args:
        directory: of the run.
        words: after `train demo`.
        devices: virtual ones.

    Raises:
        SystemExit: another run is there.
    """
    words = [*words, "--run.output", str(directory)]
    config = directory / "config.yaml"
    if config.is_file() and load_config(str(config)) != load_config("demo", words):
        raise SystemExit(f"{directory} holds a run with other flags; expected another --output")
    if (directory / "evaluation.json").is_file():
        return
    if config.is_file():
        shutil.rmtree(directory)
    virtual = f" --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + virtual}
    command = [sys.executable, "-m", "diffusion_grpo", "train", "demo", *words]
    subprocess.run(command, check=True, env=environment)


def seconds(directory: Path) -> float:
    """Return the median time of a run's iterations after the first two, which compile."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["time/iteration"] for row in rows[2:])


def load_record(file: Path, made: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """Return the results so far: what grows → size → seconds an iteration.

    Args:
        file: the record.
        made: `flags` and `iterations` of the runs.

    Raises:
        SystemExit: it is of runs with others.
    """
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    for name, value in made.items():
        if record[name] != value:
            raise SystemExit(
                f"{file} holds runs with the {name} {record[name]}, and these have {value}; "
                "expected the same, or another --record"
            )
    return {name: {int(n): t for n, t in times.items()} for name, times in record["runs"].items()}


def exponent(times: Mapping[int, float]) -> float:
    """Return e of seconds = c sizeᵉ, by least squares of the logarithms."""
    slope, _ = np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)
    return float(slope)


def to_table(record: Mapping[str, Mapping[int, float]]) -> str:
    """Return the record as a Markdown table.

    Args:
        record: what grows → size → seconds an iteration.
    """
    lines = ["| what grows | size: seconds an iteration | exponent |", "|---|---|---|"]
    for name, times in record.items():
        cells = "; ".join(f"{size}: {time:.2f}" for size, time in times.items())
        fitted = f"{exponent(times):.2f}" if len(times) > 1 else ""
        lines.append(f"| {name} | {cells} | {fitted} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--iterations", type=int, default=7, help="of each run")
    parser.add_argument("--only", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("flags", nargs="*", help="after --: for every run")
    options = parser.parse_args()
    flags = [*FLAGS, *options.flags]
    made = {"flags": flags, "iterations": options.iterations}
    record = load_record(options.record, made)
    for name in options.only:
        for size, own in SIZES[name].items():
            times = record.setdefault(name, {})
            if size in times:
                continue
            place = options.output / f"{list(SIZES).index(name)}-{size}"
            words = [*flags, *own, "--iterations", str(options.iterations)]
            run(place, words, size if name == DEVICES else 1)
            times[size] = seconds(place)
            options.record.write_text(json.dumps(made | {"runs": record}, indent=1) + "\n")
    print(to_table(record), end="")


if __name__ == "__main__":
    main()
