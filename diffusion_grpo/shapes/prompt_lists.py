"""The embedded world's prompt lists: `python -m diffusion_grpo.shapes.prompt_lists --write`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from diffusion_grpo.resources import resource_path
from diffusion_grpo.shapes.captions import captions, metadata
from diffusion_grpo.shapes.scenes import TASKS, Split, sample_scenes


def prompt_list(split: Split, size: int, *, seed: int = 0) -> list[str]:
    """Draw a list of different captions, as even over the six tasks as their number allows.

    Args:
        split: `"train"` or `"heldout"`.
        size: Number of captions.
        seed: Of the draw.

    Returns:
        Captions, the tasks taking turns.
    """
    rng = np.random.default_rng([seed, len(split)])
    pools: dict[str, list[str]] = {}
    for task in TASKS:
        scenes = sample_scenes(rng, 24 * size // len(TASKS), split=split, tasks=[task])
        pools[task] = list(dict.fromkeys(captions(scenes, rng)))
    chosen: list[str] = []
    while len(chosen) < size and any(pools.values()):
        for task in TASKS:
            if pools[task] and len(chosen) < size:
                chosen.append(pools[task].pop(0))
    return chosen


def write_prompts(directory: Path, *, sizes: tuple[int, int] = (600, 360)) -> list[Path]:
    """Write `shapes` (train) and `shapes_heldout` as .txt and .jsonl; returns the files written."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    lists: tuple[tuple[str, Split], ...] = (("shapes", "train"), ("shapes_heldout", "heldout"))
    for (name, split), size in zip(lists, sizes, strict=True):
        prompts = prompt_list(split, size)
        texts = {
            ".txt": "".join(f"{prompt}\n" for prompt in prompts),
            ".jsonl": "".join(json.dumps(metadata(prompt)) + "\n" for prompt in prompts),
        }
        for suffix, text in texts.items():
            path = directory / f"{name}{suffix}"
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written


def main() -> None:
    """Write the prompt lists, or show a few captions."""
    parser = argparse.ArgumentParser(description="Prompt lists of the embedded world.")
    parser.add_argument("--write", action="store_true", help="write the prompt lists")
    parser.add_argument("--directory", type=Path, default=resource_path("prompts"))
    args = parser.parse_args()
    if args.write:
        for path in write_prompts(args.directory):
            print(path)
    else:
        print("\n".join(captions(sample_scenes(np.random.default_rng(0), 12, split="all"))))


if __name__ == "__main__":
    main()
