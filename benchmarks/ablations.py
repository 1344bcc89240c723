"""What each choice of the preset `demo` is worth: one switch at a time, on the embedded model.

    python benchmarks/ablations.py --output runs/ablations --seeds 0 1 2
    python benchmarks/ablations.py --variants demo "step ratio" nft --plot ablations.webp
    python benchmarks/ablations.py --table

Results are kept in a record (`--record`, by default beside this file): what is in it is not run
again, and a run that was interrupted goes on, so that the table can be made in pieces and on
several machines. A record is of runs with the same flags, from the same embedded models: others are
neither added nor gone on with. The record and a table beside it, a line a variant with means over
the seeds and the range, are written after every run.
Minutes are the iterations times the median one, so without evaluations, without compilation, and
little disturbed by what else a machine did meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_grpo.resources import resource_path

# Noise and gradient in all steps.
WHOLE = ("--rollout.window-start", "0", "--rollout.window-size", "None")

# What every run has beside its variant, whose own flags count, if nothing is given after `--`.
FLAGS = (
    *("--iterations", "100", "--eval.every", "50", "--eval.keep-best", "False"),
    *("--run.report", "False", "--run.tensorboard", "off", "--run.sample-every", "0"),
)

# DiffusionNFT, which learns from the noisiest timesteps.
NFT = (
    *("--grpo.algorithm", "nft", "--grpo.kl", "mse", "--grpo.beta", "0"),
    *("--grpo.step-weights", "uniform"),
    *("--rollout.window-start", "0", "--rollout.window-size", "3"),
)

# As many images, all of them learned from.
ALL = (
    *("--rollout.prompts-per-iteration", "16", "--rollout.images-per-prompt", "8"),
    *("--grpo.best-and-worst", "None"),
)

# Variant → flags after `train PRESET`. A rollout of another size keeps the images an iteration.
VARIANTS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "uniform step weights": ("--grpo.step-weights", "uniform"),
    "learn from all images": ("--grpo.best-and-worst", "None"),
    "2 best and worst": ("--grpo.best-and-worst", "2"),
    "one initial noise a group": ("--rollout.same-initial-noise", "True"),
    "no window": WHOLE,
    "window of steps 1 to 5": ("--rollout.window-size", "5"),
    "window of steps 0 to 2": ("--rollout.window-start", "0", "--rollout.window-size", "3"),
    "no window, K = T/2": (*WHOLE, "--grpo.gradient-steps", "5"),
    "no window, K = T/4": (*WHOLE, "--grpo.gradient-steps", "3"),
    "step ratio": ("--grpo.ratio", "step"),
    "two updates a rollout": ("--grpo.updates-per-rollout", "2"),
    **{
        f"four updates a rollout, clip range {clip}": (
            *("--grpo.updates-per-rollout", "4"),
            *("--grpo.clip-low", clip, "--grpo.clip-high", clip),
        )
        for clip in ("0.5", "1.6e-3", "5.3e-4", "2.9e-4", "1e-4", "3e-5", "1e-5")
    },
    "4 prompts of 32, 8 best and worst": (
        *("--rollout.prompts-per-iteration", "4"),
        *("--rollout.images-per-prompt", "32", "--grpo.best-and-worst", "8"),
    ),
    "16 prompts of 8, 2 best and worst": (
        *("--rollout.prompts-per-iteration", "16"),
        *("--rollout.images-per-prompt", "8", "--grpo.best-and-worst", "2"),
    ),
    "no KL": ("--grpo.beta", "0"),
    "KL of 0.003": ("--grpo.beta", "0.003"),
    "KL of 0.03": ("--grpo.beta", "0.03"),
    "half the learning rate": ("--optim.learning-rate", "2e-4"),
    "no average": ("--optim.ema-decay", "None"),
    "LoRA": ("--model.trainable", "lora", "--optim.learning-rate", "1e-3"),
    "guidance 3": ("--rollout.guidance-scale", "3"),
    "nft": NFT,
    "nft, all of 16 prompts of 8": (*NFT, *ALL),
    # As long as 200 iterations of the preset.
    "two updates a rollout, 133 iterations": (
        *("--iterations", "133", "--grpo.updates-per-rollout", "2"),
    ),
    "learn from all images, 133 iterations": (
        *("--iterations", "133", "--grpo.best-and-worst", "None"),
    ),
    "demo-gold": (),
    "demo-gold nft": (*NFT, *ALL),
    "demo-mix": (),
    "demo-mix nft": (*NFT, *ALL),
    # Long runs: what comes of the preset, and of the reward, in half an hour and more.
    "700 iterations": ("--iterations", "700"),
    "no KL, 700 iterations": ("--iterations", "700", "--grpo.beta", "0"),
    "demo-gold 500 iterations": ("--iterations", "500"),
    "demo-gold 700 iterations": ("--iterations", "700"),
    "demo-gold 900 iterations": ("--iterations", "900"),
    "demo-gold nft 500 iterations": (*NFT, *ALL, "--iterations", "500"),
    "demo-gold nft 1000 iterations": (*NFT, *ALL, "--iterations", "1000"),
    "demo-mix nft 500 iterations": (*NFT, *ALL, "--iterations", "500"),
}


def preset_of(variant: str) -> str:
    """Return the preset that a variant changes."""
    return variant.split()[0] if variant.startswith("demo-") else "demo"


def flags_of(variant: str) -> list[str]:
    """Return the flags of a variant."""
    return list(VARIANTS[variant])


def train_arguments(variant: str, seed: int, extra: Sequence[str]) -> list[str]:
    """Return what comes after `train` for a run; the last flag of a name counts."""
    return [preset_of(variant), *extra, *flags_of(variant), "--run.seed", str(seed)]


def embedded_models() -> str:
    """Return 12 hexadecimal digits that tell the embedded weights from others: of their SHA-256."""
    found = hashlib.sha256()
    for file in sorted(resource_path("assets").rglob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]


def directory_of(output: Path, variant: str, seed: int, extra: Sequence[str], base: str) -> Path:
    """Return where a run is: by its variant, and by all that makes it another run.

    Args:
        output: the folder of all runs.
        variant: one of `VARIANTS`.
        seed: of the run.
        extra: the flags that every run has.
        base: `embedded_models`, of what it starts from.
    """
    name = "".join(c if c.isalnum() else "-" for c in variant.lower())
    told = json.dumps([train_arguments(variant, seed, extra), base])
    mark = hashlib.sha256(told.encode()).hexdigest()[:8]
    return output / f"{'-'.join(filter(None, name.split('-')))}-{seed}-{mark}"


def train(directory: Path, variant: str, seed: int, extra: Sequence[str]) -> None:
    """Run or go on; nothing where the run is finished."""
    if (directory / "evaluation.json").is_file():
        return
    command = [sys.executable, "-m", "diffusion_grpo", "train"]
    if (directory / "config.yaml").is_file():
        command += ["--resume", str(directory)]
    else:
        command += [*train_arguments(variant, seed, extra), "--run.output", str(directory)]
    subprocess.run(command, check=True)


def read_run(directory: Path) -> dict[str, Any]:
    """Return a finished run's results and its curve.

    Returns:
        `rewards` of `evaluation.json`, `minutes` of training as above, and `curve`: a list of
        `{iteration, minutes}` with each evaluated reward.
    """
    found = json.loads((directory / "evaluation.json").read_text())["rewards"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    minute = statistics.median(row["time/iteration"] for row in rows) / 60
    curve = []
    for row in rows:
        means = {
            name.removeprefix("eval/reward/").removesuffix("/mean"): value
            for name, value in row.items()
            if name.startswith("eval/reward/") and name.endswith("/mean") and name.count("/") == 3
        }
        if means:
            done = row["iteration"] + 1
            curve.append({"iteration": done, "minutes": done * minute} | means)
    return {"rewards": found, "minutes": len(rows) * minute, "curve": curve}


def load_record(file: Path, flags: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the results so far, variant → seed → what `read_run` returns.

    Raises:
        SystemExit: they are of runs with other flags.
    """
    if not file.is_file():
        return {}
    record = json.loads(file.read_text())
    if record["flags"] != list(flags):
        raise SystemExit(
            f"{file} holds runs with the flags {record['flags']}, and these have {list(flags)}; "
            "expected the same, or another --record"
        )
    return record["runs"]


def check_base(file: Path, base: str) -> None:
    """Find before a run that its result would stand beside those of other embedded models.

    Raises:
        SystemExit: so it is.
    """
    if file.is_file() and (recorded := json.loads(file.read_text()).get("base")) != base:
        raise SystemExit(
            f"{file} holds runs from the embedded models {recorded}, and those here are {base}; "
            "expected the same, or another --record"
        )


def add_to_record(
    file: Path, flags: Sequence[str], base: str, variant: str, seed: int, found: Any
) -> None:
    """Put a result into the record, as it is now, and write the table."""
    check_base(file, base)
    runs = load_record(file, flags)
    runs.setdefault(variant, {})[str(seed)] = found
    runs = {variant: runs[variant] for variant in VARIANTS if variant in runs}
    scratch = file.with_suffix(".tmp")
    told = {"flags": list(flags), "base": base, "runs": runs}
    scratch.write_text(json.dumps(told, indent=1) + "\n")
    os.replace(scratch, file)
    file.with_suffix(".md").write_text(to_table(of_seeds(runs)))


def of_seeds(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return each variant's results in the order of the seeds."""
    return {variant: [found[s] for s in sorted(found, key=int)] for variant, found in runs.items()}


def gold_of(row: Mapping[str, Any]) -> Any:
    """Return what belongs to the verifier's strict verdict, of a mapping by rewards."""
    return next(row[name] for name in ("shapes_exact", "shapes") if name in row)


def trained_of(row: Mapping[str, Any]) -> Any:
    """Return what belongs to the reward that was trained on (of two, the CLIP score)."""
    return row["clip"] if "clip" in row else row["shapes"]


def curve_of(
    found: Sequence[Mapping[str, Any]], pick: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[float, list[float]]]:
    """Return an evaluated quantity from before the first iteration to after the last.

    Args:
        found: what `read_run` returns of each seed, evaluated after the same iterations.
        pick: the quantity, of a mapping by rewards.

    Returns:
        Mean minutes, and the value of each seed.
    """
    lines = [
        [(0.0, pick(run["rewards"])["before"])]
        + [(row["minutes"], pick(row)) for row in run["curve"]]
        + [(run["minutes"], pick(run["rewards"])["after"])]
        for run in found
    ]
    return [
        (sum(minutes for minutes, _ in same) / len(same), [value for _, value in same])
        for same in zip(*lines, strict=True)
    ]


def plot(runs: Mapping[str, Sequence[Mapping[str, Any]]], file: Path) -> None:
    """Draw two curves against minutes, means and range of the seeds.

    The share that the verifier finds right, and below it the mean of the reward that is trained on:
    where the second rises and the first does not, the reward is hacked.

    Args:
        runs: variant → what `read_run` returns of each seed.
        file: a picture.
    """
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 8), dpi=110)
    for axes, pick, scale in ((above, gold_of, 100), (below, trained_of, 1)):
        for variant, found in runs.items():
            points = curve_of(found, pick)
            minutes = [time for time, _ in points]
            means = [scale * sum(values) / len(values) for _, values in points]
            (line,) = axes.plot(minutes, means, marker="o", markersize=3, label=variant)
            bounds = [[scale * end(values) for _, values in points] for end in (min, max)]
            axes.fill_between(minutes, *bounds, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.grid(alpha=0.3)
    above.set_ylabel("held-out images right, %")
    below.set_ylabel("reward that is trained on (the same images)")
    below.set_xlabel("minutes of training")
    above.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file)


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
        gold = [gold_of(r["rewards"]) for r in found]
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
    parser.add_argument("--record", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--plot", type=Path, help="draw the chosen variants' curves to this file")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("flags", nargs="*", help="after --: for every run, e.g. --eval.every 25")
    options = parser.parse_args()
    flags, base = options.flags or list(FLAGS), embedded_models()
    for seed in () if options.table else options.seeds:
        for variant in options.variants:
            if str(seed) in load_record(options.record, flags).get(variant, {}):
                continue
            check_base(options.record, base)
            directory = directory_of(options.output, variant, seed, flags, base)
            train(directory, variant, seed, flags)
            add_to_record(options.record, flags, base, variant, seed, read_run(directory))
    runs = load_record(options.record, flags)
    chosen = of_seeds({v: runs[v] for v in options.variants if v in runs})
    print(to_table(chosen), end="")
    if options.plot is not None:
        plot(chosen, options.plot)


if __name__ == "__main__":
    main()
