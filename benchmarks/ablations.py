"""What each choice of the preset `demo` is worth: one switch at a time, on the embedded model.

    python benchmarks/ablations.py --output runs/ablations --seeds 0 1 2
    python benchmarks/ablations.py --output runs/ablations --variants demo "step ratio" nft

Runs that are there are not run again, and one that was interrupted goes on, so that the table can
be made in pieces. `ablations.md` is written after every run: a line a variant, means over the seeds
with the range; `ablations.json` has the curves. `diffusion-grpo report` on the run directories
draws them. Wall time is that of the training alone, evaluations left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Noise and gradient in all steps.
WHOLE = ("--rollout.window-start", "0", "--rollout.window-size", "None")

# Variant → flags after `train PRESET`. A rollout of another size keeps the images an iteration.
VARIANTS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "no window": WHOLE,
    "window of steps 2 to 6": ("--rollout.window-start", "2", "--rollout.window-size", "5"),
    "window of steps 0 to 2": ("--rollout.window-start", "0", "--rollout.window-size", "3"),
    "no window, K = T/2": (*WHOLE, "--grpo.gradient-steps", "5"),
    "no window, K = T/4": (*WHOLE, "--grpo.gradient-steps", "3"),
    "step ratio": ("--grpo.ratio", "step"),
    "two updates a rollout": ("--grpo.updates-per-rollout", "2"),
    "own initial noise": ("--rollout.same-initial-noise", "False"),
    "weights by gain": ("--grpo.step-weights", "gain"),
    "4 prompts of 16": (
        *("--rollout.prompts-per-iteration", "4"),
        *("--rollout.images-per-prompt", "16"),
    ),
    "16 prompts of 4": (
        *("--rollout.prompts-per-iteration", "16"),
        *("--rollout.images-per-prompt", "4"),
    ),
    "KL of 0.01": ("--grpo.beta", "0.01"),
    "half the learning rate": ("--optim.learning-rate", "2e-4"),
    "no average": ("--optim.ema-decay", "None"),
    "LoRA": ("--model.trainable", "lora", "--optim.learning-rate", "1e-3"),
    "guidance 3": ("--rollout.guidance-scale", "3"),
    "nft": (
        *("--grpo.algorithm", "nft", "--grpo.kl", "mse", "--iterations", "120"),
        *("--rollout.window-start", "0", "--rollout.window-size", "3"),
    ),
    "demo-gold": (),
    "demo-mix": (),
}


def preset_of(variant: str) -> str:
    """Return the preset that a variant changes."""
    return variant if variant.startswith("demo-") else "demo"


def flags_of(variant: str) -> list[str]:
    """Return the flags of a variant."""
    return list(VARIANTS[variant])


def directory_of(output: Path, variant: str, seed: int) -> Path:
    """Return where a run of a variant is."""
    name = "".join(c if c.isalnum() else "-" for c in variant.lower())
    return output / f"{'-'.join(filter(None, name.split('-')))}-{seed}"


def train(directory: Path, variant: str, seed: int, extra: Sequence[str]) -> None:
    """Run or go on; nothing where the run is finished."""
    if (directory / "evaluation.json").is_file():
        return
    command = [sys.executable, "-m", "diffusion_grpo", "train"]
    if (directory / "config.yaml").is_file():
        command += ["--resume", str(directory)]
    else:
        command += [preset_of(variant), *flags_of(variant), "--run.seed", str(seed)]
        command += ["--run.output", str(directory), *extra]
    subprocess.run(command, check=True)


def read_run(directory: Path) -> dict[str, Any]:
    """Return a finished run's results and its curve.

    Returns:
        `rewards` of `evaluation.json`, `minutes` of training, and `curve`: a list of
        `{iteration, minutes}` with each evaluated reward.
    """
    found = json.loads((directory / "evaluation.json").read_text())["rewards"]
    seconds, curve = 0.0, []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds += row["time/iteration"]
        means = {
            name.removeprefix("eval/reward/").removesuffix("/mean"): value
            for name, value in row.items()
            if name.startswith("eval/reward/") and name.endswith("/mean") and name.count("/") == 3
        }
        if means:
            curve.append({"iteration": row["iteration"] + 1, "minutes": seconds / 60} | means)
    return {"rewards": found, "minutes": seconds / 60, "curve": curve}


def spread(values: Sequence[float], scale: float, digits: int) -> str:
    """Return the mean, and the range where there is more than one value."""
    mean = sum(values) / len(values)
    text = f"{scale * mean:.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({scale * min(values):.{digits}f} to {scale * max(values):.{digits}f})"


def to_table(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return the results as a Markdown table.

    Args:
        runs: variant → what `read_run` returns of each seed.
    """
    lines = [
        "| variant | seeds | right before, % | right after, % | CLIP after | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for variant, found in runs.items():
        gold = [
            next(r["rewards"][n] for n in ("shapes_exact", "shapes") if n in r["rewards"])
            for r in found
        ]
        clip = [r["rewards"]["clip"]["after"] for r in found if "clip" in r["rewards"]]
        cells = [
            variant,
            str(len(found)),
            spread([g["before"] for g in gold], 100, 1),
            spread([g["after"] for g in gold], 100, 1),
            spread(clip, 1, 4) if clip else "",
            spread([r["minutes"] for r in found], 1, 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("flags", nargs="*", help="after --: for every run, e.g. --eval.every 25")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for variant in options.variants:
            train(directory_of(options.output, variant, seed), variant, seed, options.flags)
            places = {
                v: [directory_of(options.output, v, s) for s in options.seeds]
                for v in options.variants
            }
            done = {
                v: [read_run(p) for p in paths if (p / "evaluation.json").is_file()]
                for v, paths in places.items()
            }
            done = {variant: found for variant, found in done.items() if found}
            (options.output / "ablations.md").write_text(to_table(done))
            (options.output / "ablations.json").write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
