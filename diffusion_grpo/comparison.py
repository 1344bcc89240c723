"""Pictures side by side: models at the same seeds, and a run's evaluations over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Entry, Gallery
from diffusion_grpo.grids import (
    RIGHT,
    TEXT_SIZE,
    WRONG,
    draw_page,
    draw_strip,
    enlarge,
    image_grid,
    pack,
)

_UP, _DOWN, _SAME = (17, 115, 75), (179, 55, 42), (110, 114, 120)


def comparison_grid(
    images: Sequence[np.ndarray],
    labels: Sequence[str],
    captions: Sequence[str],
    *,
    scores: Sequence[np.ndarray] | None = None,
    text_size: int = TEXT_SIZE,
) -> Image.Image:
    """Draw what several models make of the same prompts and seeds, a panel a picture.

    Args:
        images: for each model, uint8 [N, H, W, 3] in the same order; smaller ones than those of
            another model are enlarged to fit in their place.
        labels: one a model, above its column.
        captions: N prompts.
        scores: for each model float [N]; under each picture, and under those of the second model
            and further with the difference to the first, green where it is higher and red where it
            is lower. Where every score is 0 or 1, a tick or a cross instead.
        text_size: as in `image_grid`.

    Raises:
        ValueError: counts that do not fit.
    """
    counts = {len(model) for model in images} | {len(captions)}
    if len(counts) > 1 or len(labels) != len(images):
        raise ValueError(f"{sorted(counts)} images and captions: expected the same number of each")
    columns = _of_one_size([enlarge(model) for model in images])
    first_scores = scores[0] if scores else np.zeros(0)
    judged = bool(scores) and bool(np.isin(scores, (0, 1)).all())
    panels = []
    for row, caption in enumerate(captions):
        notes, colors = [], []
        for number, model in enumerate(scores or ()):
            if judged:
                notes.append(RIGHT if model[row] else WRONG)
                colors.append(_UP if model[row] else _DOWN)
                continue
            first = first_scores[row] if number else model[row]
            change = float(model[row] - first)
            notes.append(f"{model[row]:.3f}" + (f"  {change:+.3f}" if number else ""))
            colors.append(_UP if change > 0 else _DOWN if change < 0 else _SAME)
        strip = draw_strip(
            [column[row] for column in columns],
            notes=notes,
            note_colors=colors,
            caption=caption,
            heads=dict(enumerate(labels)),
            text_size=text_size,
        )
        panels.append(strip)
    return draw_page(pack(panels), title="", text_size=text_size)


def _of_one_size(columns: Sequence[list[Image.Image]]) -> list[list[Image.Image]]:
    """Enlarge the pictures of each column to the largest width and height, white beside them."""
    size = max(c[0].width for c in columns), max(c[0].height for c in columns)
    method = Image.Resampling.LANCZOS
    return [
        column
        if column[0].size == size
        else [ImageOps.pad(cell, size, method, color="white") for cell in column]
        for column in columns
    ]


def chosen_evaluations(gallery: Gallery, most: int) -> list[Entry]:
    """Return at most `most` of a run's evaluations, evenly over the run, with the ends.

    Raises:
        UsageError: the run has recorded fewer than two.
    """
    entries = gallery.entries("evaluation")
    if len(entries) < 2:
        raise UsageError(
            f"{str(gallery.folder.parent)!r} has {len(entries)} recorded evaluations; expected two "
            "or more: train with --eval.every"
        )
    most = max(2, min(most, len(entries)))
    places = sorted({round(i * (len(entries) - 1) / (most - 1)) for i in range(most)})
    return [entries[place] for place in places]


def when(entry: Entry) -> str:
    """Return `before` or `after 20`."""
    return f"after {entry.iteration}" if entry.iteration else "before"


def time_lapse_strip(
    gallery: Gallery, *, prompts: int = 6, most: int = 8, text_size: int = TEXT_SIZE
) -> Image.Image:
    """Draw fixed prompts over a run's evaluations: one row a prompt, time to the right.

    Args:
        gallery: the run's.
        prompts: how many of the held-out prompts, from the first.
        most: at most so many evaluations, evenly over the run.
        text_size: of captions.

    Raises:
        UsageError: as `chosen_evaluations`, or a sheet is missing.
    """
    entries = chosen_evaluations(gallery, most)
    images = [gallery.images(entry)[:: entry.group][:prompts] for entry in entries]
    captions = entries[0].prompts[:: entries[0].group][:prompts]
    scores = [entry.numbers("total")[:: entry.group][:prompts] for entry in entries]
    return comparison_grid(
        images, [when(entry) for entry in entries], captions, scores=scores, text_size=text_size
    )


def time_lapse_frames(
    gallery: Gallery, *, prompts: int = 16, most: int = 60, text_size: int = TEXT_SIZE
) -> list[Image.Image]:
    """Draw the same prompts once an evaluation, as the frames of an animation; as the strip."""
    frames = []
    for entry in chosen_evaluations(gallery, most):
        shown = gallery.images(entry)[:: entry.group][:prompts]
        captions = entry.prompts[:: entry.group][:prompts]
        frames.append(image_grid(shown, captions, title=when(entry), text_size=text_size))
    return frames
