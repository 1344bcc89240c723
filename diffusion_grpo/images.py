"""Pictures for people: 8-bit images, captioned grids, PNG files that say how they were made."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion_grpo.errors import UsageError

Resample = Literal["nearest", "lanczos"]

_WHITE, _INK, _GRAY, _FRAME = (255, 255, 255), (32, 33, 36), (110, 114, 120), (214, 217, 222)
_MARGIN, _GAP, _PADDING = 20, 6, 18  # around the grid, between cells, between rows; pixels
_MIDDLE = 22  # between before and after
_TEXT_SIZE, _SMALL_SIZE, _TITLE_SIZE = 15, 13, 20
_MAX_WIDTH = 1400  # a grid of pairs starts a new row of pairs past this many pixels


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images to 8 bits: round(255 · clip(x, 0, 1)), halves to even.

    Args:
        images: floating, any shape, in [0, 1]; values outside are clipped.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: not floating, or not finite.
    """
    # A half or bfloat16 product would round twice. bfloat16 is no NumPy dtype, but casts safely.
    if images.dtype.kind in "iub" or not np.can_cast(images.dtype, np.float64):
        raise ValueError(f"images have dtype {images.dtype}, expected floating in [0, 1]")
    wide = images.astype(np.promote_types(images.dtype, np.float32))
    finite = np.isfinite(wide)
    if not finite.all():
        first = int(np.argwhere(~finite)[0][0]) if wide.ndim else 0
        raise ValueError(f"image {first} holds NaN or infinity: has the model diverged?")
    return np.round(np.clip(wide, 0.0, 1.0) * 255.0).astype(np.uint8)


def image_grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    title: str = "",
    min_size: int = 128,
    resample: Resample = "lanczos",
) -> Image.Image:
    """Draw images in rows and columns on white, with captions under each row or each cell.

    Args:
        images: uint8 [N, H, W, 3], row by row.
        captions: none, one a row (N / columns of them, rounded up), or one an image (N).
        columns: images a row; by default the number that makes the grid about square, or N / number
            of captions where that is whole.
        title: a heading, or `""`.
        min_size: images whose shorter side is smaller are enlarged, by a whole factor, to at least
            this many pixels.
        resample: how they are enlarged; `nearest` shows the pixels as they are.

    Returns:
        An RGB image.

    Raises:
        ValueError: not images, no image, or a number of captions that fits neither rows nor cells.
    """
    cells = _enlarge(images, min_size=min_size, resample=resample)
    columns = columns or _default_columns(len(cells), captions)
    starts = range(0, len(cells), columns)
    captions = list(captions or [])
    if captions and len(captions) not in (len(starts), len(cells)):
        raise ValueError(
            f"{len(captions)} captions for {len(cells)} images in {len(starts)} rows: "
            "expected one a row or one an image"
        )
    per_row = bool(captions) and len(captions) == len(starts)
    rows = [
        _strip(
            cells[start : start + columns],
            notes=[] if per_row else captions[start : start + columns],
            caption=captions[row] if per_row else "",
        )
        for row, start in enumerate(starts)
    ]
    return _page([[row] for row in rows], title=title)


def before_after_grid(
    before: np.ndarray,
    after: np.ndarray,
    captions: Sequence[str],
    *,
    scores_before: np.ndarray | None = None,
    scores_after: np.ndarray | None = None,
    title: str = "",
    min_size: int = 128,
    resample: Resample = "lanczos",
) -> Image.Image:
    """Draw pairs of images, before and after training, at the same prompts and seeds.

    Args:
        before: uint8 [P * G, H, W, 3], prompt by prompt.
        after: the same shape, the same order.
        captions: P prompts; P divides the number of images.
        scores_before: float [P * G], written under the images.
        scores_after: the same for `after`.
        title: a heading, or `""`.
        min_size: as in `image_grid`.
        resample: as in `image_grid`.

    Returns:
        An RGB image; for each prompt its G images before on the left and after on the right.

    Raises:
        ValueError: shapes or counts that do not fit.
    """
    if before.shape != after.shape:
        raise ValueError(f"before has shape {before.shape}, after {after.shape}: expected the same")
    count = len(before)
    if not captions or count % len(captions):
        raise ValueError(
            f"{count} images and {len(captions)} captions: expected G images a caption"
        )
    for scores in (scores_before, scores_after):
        if scores is not None and np.shape(scores) != (count,):
            raise ValueError(f"scores have shape {np.shape(scores)}, expected ({count},)")
    group = count // len(captions)
    sides = []
    for images, scores in ((before, scores_before), (after, scores_after)):
        cells = _enlarge(images, min_size=min_size, resample=resample)
        sides.append((cells, [] if scores is None else [f"{score:.3f}" for score in scores]))
    panels = []
    for row, caption in enumerate(captions):
        part = slice(row * group, (row + 1) * group)
        cells = [cell for side, _ in sides for cell in side[part]]
        notes = [note for _, side in sides for note in (side[part] or [""] * group)]
        heads = {0: "before", group: "after"}
        panels.append(_strip(cells, notes=notes, caption=caption, heads=heads, split=group))
    panel_width = panels[0].width + 2 * _PADDING
    across = min(len(panels), max(1, (_MAX_WIDTH - 2 * _MARGIN) // panel_width))
    across = -(-len(panels) // -(-len(panels) // across))  # as even as the number of rows allows
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    return _page(rows, title=title)


def check_image_path(path: str | Path) -> Path:
    """Check that a PNG can be written at a path, before any work is done for it.

    Args:
        path: the file to be; an existing one may be replaced.

    Returns:
        The path, with `~` expanded.

    Raises:
        UsageError: not a .png name, a directory, or a folder that is missing or not writable.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(
            f"image path {str(path)!r} is a directory; expected a file such as grid.png"
        )
    if path.suffix.lower() != ".png":
        raise UsageError(f"image path {str(path)!r} does not end in .png: PNG is what is written")
    parent = path.parent
    if not parent.is_dir():
        state = "is not a folder" if parent.exists() else "does not exist: create it first"
        raise UsageError(f"image path {str(path)!r}: the folder {str(parent)!r} {state}")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UsageError(f"image path {str(path)!r} is not writable: choose another folder")
    return path


def save_image(
    path: str | Path, image: Image.Image, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a PNG with text metadata (tEXt chunks; iTXt for text beyond Latin-1).

    Args:
        path: ends in .png; its folder exists.
        image: what to write.
        metadata: keyword (1 to 79 Latin-1 characters) to value; what is not text is written as
            JSON.

    Raises:
        UsageError: as `check_image_path`.
        ValueError: a keyword that PNG does not admit.
    """
    path = check_image_path(path)
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        if not (1 <= len(key) <= 79 and key.isprintable() and key == key.strip()):
            raise ValueError(f"PNG keyword {key!r}: expected 1 to 79 printable characters")
        info.add_text(key, value if isinstance(value, str) else json.dumps(value))
    image.save(path, "PNG", pnginfo=info)


def _default_columns(count: int, captions: Sequence[str] | None) -> int:
    if captions and len(captions) < count and count % len(captions) == 0:
        return count // len(captions)
    return int(np.ceil(np.sqrt(count)))


def _enlarge(images: np.ndarray, *, min_size: int, resample: Resample) -> list[Image.Image]:
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 [N, H, W, 3], N > 0"
        )
    _, height, width, _ = images.shape
    factor = max(1, -(-min_size // min(height, width)))
    method = Image.Resampling.NEAREST if resample == "nearest" else Image.Resampling.LANCZOS
    size = (width * factor, height * factor)
    return [Image.fromarray(image).resize(size, method) for image in images]


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _wrap(text: str, font: Any, width: int, max_lines: int = 3) -> list[str]:
    """Break a text into lines of at most `width` pixels; the last line ends in … if it is cut."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width and len(word) > 1:  # a word wider than the line
            fits = next(
                n
                for n in range(len(word) - 1, 0, -1)
                if n == 1 or font.getlength(word[:n]) <= width
            )
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last.rstrip()}…"]


def _line_height(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 2


def _strip(
    cells: Sequence[Image.Image],
    *,
    notes: Sequence[str] = (),
    caption: str = "",
    heads: Mapping[int, str] | None = None,
    split: int = 0,
) -> Image.Image:
    """Draw cells side by side: heads above, a note under each, a caption under all.

    `heads` is the index of a cell to the text that begins above it; `split` is the index of the
    cell before which the gap is wide.
    """
    text, small = _font(_TEXT_SIZE), _font(_SMALL_SIZE)
    cell_width, cell_height = cells[0].size
    lefts = [
        1 + index * (cell_width + _GAP) + (_MIDDLE - _GAP if split and index >= split else 0)
        for index in range(len(cells))
    ]
    width = lefts[-1] + cell_width + 1
    note_lines = [_wrap(note, small, cell_width) for note in notes]
    caption_lines = _wrap(caption, text, width)
    note_rows = max(map(len, note_lines), default=0)
    top = _line_height(small) + 3 if heads else 1
    below = top + cell_height + 4
    caption_top = below + note_rows * _line_height(small)
    height = caption_top + len(caption_lines) * _line_height(text)
    strip = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(strip)
    for index, head in (heads or {}).items():
        draw.text((lefts[index] - 1, 0), head, fill=_GRAY, font=small)
    for left, cell in zip(lefts, cells, strict=True):
        frame = (left - 1, top - 1, left + cell_width, top + cell_height)
        draw.rectangle(frame, outline=_FRAME)  # around, not over: a white picture needs an edge
        strip.paste(cell, (left, top))
    for left, lines in zip(lefts, note_lines, strict=False):
        for row, line in enumerate(lines):
            draw.text((left - 1, below + row * _line_height(small)), line, fill=_GRAY, font=small)
    for row, line in enumerate(caption_lines):
        draw.text((0, caption_top + row * _line_height(text)), line, fill=_INK, font=text)
    return strip


def _page(rows: Sequence[Sequence[Image.Image]], *, title: str) -> Image.Image:
    """Lay strips out in rows on a white page with margins and a heading."""
    font = _font(_TITLE_SIZE)
    columns = max(map(len, rows))
    step = max(strip.width for row in rows for strip in row) + 2 * _PADDING
    width = columns * step - 2 * _PADDING + 2 * _MARGIN
    title_lines = _wrap(title, font, width - 2 * _MARGIN)
    top = _MARGIN + len(title_lines) * _line_height(font) + (_PADDING // 2 if title_lines else 0)
    heights = [max(strip.height for strip in row) for row in rows]
    height = top + sum(heights) + _PADDING * (len(rows) - 1) + _MARGIN
    page = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(page)
    for row, line in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + row * _line_height(font)), line, fill=_INK, font=font)
    for row, row_height in zip(rows, heights, strict=True):
        for column, strip in enumerate(row):
            page.paste(strip, (_MARGIN + column * step, top))
        top += row_height + _PADDING
    return page
