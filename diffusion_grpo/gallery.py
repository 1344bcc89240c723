"""The pictures of a run, kept for people: one contact sheet a rollout and one an evaluation.

A sheet is a WebP of tiles without gaps, row by row, beside a line of JSON that says what they are.
`report.py` and `compare` read them, so that neither needs the model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion_grpo.errors import UsageError

Kind = Literal["rollout", "evaluation"]

FOLDER = "gallery"
ROLLOUT_TILE, EVALUATION_TILE = 64, 256  # longest side of a tile, in pixels
# WebP ends at 16383 pixels a side, and Pillow takes a picture of more than 9459² for an attack when
# it is read.
LONGEST_SIDE = 9459


@dataclasses.dataclass(frozen=True)
class Entry:
    """The line of one sheet.

    Attributes:
        iteration: rollouts: that of the rollout, from 0; evaluations: how many iterations were done
            before it, so that 0 is the untrained model.
        sheet: the file's name in the gallery.
        columns: tiles a row.
        tile: width and height of a tile; less than `ROLLOUT_TILE` or `EVALUATION_TILE` where so
            many images are there that the sheet would be too large.
        prompts: one text an image.
        scores: reward name → one number an image, None where the reward failed; `total` is what
            training maximizes.
        advantages: one an image, for rollouts.
        group: images a prompt.
        tasks: one an image, where the prompts' metadata have a task.
        summary: what the evaluation came to, for evaluations.
    """

    iteration: int
    sheet: str
    columns: int
    tile: tuple[int, int]
    prompts: list[str]
    scores: dict[str, list[float | None]]
    advantages: list[float | None] | None = None
    group: int = 1
    tasks: list[str] | None = None
    summary: dict[str, Any] | None = None

    def numbers(self, name: str) -> np.ndarray:
        """Return a reward's scores, float64 [B]; NaN where it failed."""
        return np.array(self.scores[name], np.float64)


class Gallery:
    """Writes the sheets of a run, and reads them back."""

    def __init__(self, run_dir: str | Path) -> None:
        """Name the folder; nothing is made before something is added."""
        self.folder = Path(run_dir) / FOLDER
        self._last: dict[Kind, int] = {}

    def add(
        self,
        kind: Kind,
        iteration: int,
        images: np.ndarray,
        prompts: Sequence[str],
        scores: Mapping[str, np.ndarray],
        **extra: Any,
    ) -> None:
        """Write a sheet and its line; one of the same iteration is replaced.

        Args:
            kind: of a rollout or of an evaluation.
            iteration: as in `Entry`.
            images: uint8 [B, H, W, 3].
            prompts: B texts.
            scores: name → [B].
            **extra: other fields of `Entry`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        longest = ROLLOUT_TILE if kind == "rollout" else EVALUATION_TILE
        sheet, columns, tile = contact_sheet(images, longest)
        name = f"{kind}_{iteration:05d}.webp"
        sheet.save(self.folder / name, "WEBP", quality=80, method=4)
        if extra.get("advantages") is not None:
            extra["advantages"] = _rounded(extra["advantages"])
        rows = {key: _rounded(values) for key, values in scores.items()}
        entry = Entry(iteration, name, columns, tile, list(prompts), rows, **extra)
        # What is there is read once, not at every iteration: it grows with them.
        if kind not in self._last:
            self._last[kind] = max((old.iteration for old in self.entries(kind)), default=-1)
        if self._last[kind] >= iteration:
            earlier = [old for old in self.entries(kind) if old.iteration < iteration]
            self._write(kind, [*earlier, entry])
        else:
            with self.index(kind).open("a", encoding="utf-8") as file:
                file.write(_line(entry))
        self._last[kind] = iteration

    def entries(self, kind: Kind) -> list[Entry]:
        """Return the sheets' lines in order; a last line that was cut short is left out."""
        path = self.index(kind)
        if not path.is_file():
            return []
        entries = []
        # By \n alone: a prompt may hold other ends of lines, such as U+2028.
        for line in filter(None, path.read_bytes().split(b"\n")):
            try:
                values = json.loads(line)
            except ValueError:  # the process died while writing, perhaps within a character
                break
            entries.append(Entry(**values | {"tile": tuple(values["tile"])}))
        return entries

    def images(self, entry: Entry) -> np.ndarray:
        """Return the tiles of a sheet, uint8 [B, h, w, 3].

        Raises:
            UsageError: the sheet is not there.
        """
        path = self.folder / entry.sheet
        if not path.is_file():
            raise UsageError(f"the run's gallery has no {entry.sheet}: it was deleted")
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        width, height = entry.tile
        return np.stack(
            [
                pixels[y : y + height, x : x + width]
                for y, x in (
                    (i // entry.columns * height, i % entry.columns * width)
                    for i in range(len(entry.prompts))
                )
            ]
        )

    def truncate_after(self, done: int, *, evaluated: bool = True) -> None:
        """Forget what came after `done` iterations, before a run goes on from its checkpoint.

        Args:
            done: iterations.
            evaluated: keep the evaluation after the last of them.
        """
        evaluation = done if evaluated or not done else done - 1
        last: tuple[tuple[Kind, int], ...] = (("rollout", done - 1), ("evaluation", evaluation))
        self._last = {}
        for kind, iteration in last:
            entries = self.entries(kind)
            kept = [entry for entry in entries if entry.iteration <= iteration]
            if self.index(kind).is_file():  # also without a last line that was cut short
                self._write(kind, kept)

    def index(self, kind: Kind) -> Path:
        """Return the file of the sheets' lines, which changes with every sheet."""
        return self.folder / f"{kind}s.jsonl"

    def _write(self, kind: Kind, entries: Sequence[Entry]) -> None:
        scratch = self.index(kind).with_suffix(".tmp")
        scratch.write_text("".join(map(_line, entries)), encoding="utf-8")
        os.replace(scratch, self.index(kind))


def contact_sheet(images: np.ndarray, longest: int) -> tuple[Image.Image, int, tuple[int, int]]:
    """Lay images out without gaps, about as wide as high.

    Args:
        images: uint8 [B, H, W, 3].
        longest: larger images are reduced to this longest side, and further where so many are
            there that a side of the sheet would pass `LONGEST_SIDE`.

    Returns:
        The sheet, the tiles a row, and a tile's (width, height).
    """
    columns = int(np.ceil(np.sqrt(len(images))))
    # There are no more rows than columns, and no side of a tile is longer than this.
    tiles = reduced(images, min(longest, max(1, LONGEST_SIDE // columns)))
    count, height, width, _ = tiles.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(Image.fromarray(tile), (index % columns * width, index // columns * height))
    return sheet, columns, (width, height)


def reduced(images: np.ndarray, longest: int) -> np.ndarray:
    """Reduce larger images to a longest side; others are returned as they are.

    Args:
        images: uint8 [B, H, W, 3].
        longest: in pixels.

    Returns:
        uint8 [B, h, w, 3].
    """
    _, height, width, _ = images.shape
    factor = min(1.0, longest / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    if size == (width, height):
        return images
    pictures = [Image.fromarray(image) for image in images]
    return np.stack([np.asarray(p.resize(size, Image.Resampling.LANCZOS)) for p in pictures])


def _rounded(values: Any) -> list[float | None]:
    """Return five digits of each number; None for the NaN of an image that a reward failed on."""
    return [
        float(f"{float(value):.5g}") if np.isfinite(value) else None for value in np.asarray(values)
    ]


def _line(entry: Entry) -> str:
    return json.dumps(dataclasses.asdict(entry), ensure_ascii=False, allow_nan=False) + "\n"
