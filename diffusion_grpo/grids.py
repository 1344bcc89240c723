"""Grids of pictures for people: rows and columns with captions, before beside after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from diffusion_grpo.fonts import font_for

Resample = Literal["nearest", "lanczos"]

_WHITE, _INK, _GRAY, _FRAME = (255, 255, 255), (32, 33, 36), (110, 114, 120), (214, 217, 222)
_MARGIN, _GAP, _PADDING = 20, 6, 18  # around the grid, between cells, between rows; pixels
_MIDDLE = 22  # between before and after
TEXT_SIZE = 15  # of captions, in pixels
MIN_SIZE = 128  # pixels of an image's shorter side: smaller ones are enlarged, by a whole factor
_SMALL, _LARGE = 13 / 15, 20 / 15  # notes and headings, relative to captions
RIGHT, WRONG = "✓", "✗"
_MARKS = {  # lines, relative to the size of the text
    RIGHT: ((0.1, 0.7), (0.4, 1.0), (1.0, 0.3)),
    WRONG: ((0.1, 0.3), (0.8, 1.0), (0.45, 0.65), (0.8, 0.3), (0.1, 1.0)),
}
_MAX_WIDTH = 1400  # a grid of pairs starts a new row of pairs past this many pixels


def image_grid(
    images: np.ndarray,
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    title: str = "",
    max_size: int | None = None,
    text_size: int = TEXT_SIZE,
    resample: Resample = "lanczos",
) -> Image.Image:
    """Draw images in rows and columns on white, with captions under each row or each cell.

    Images whose shorter side is below `MIN_SIZE` are enlarged to at least that.

    Args:
        images: uint8 [N, H, W, 3], row by row.
        captions: none, one a row (N / columns of them, rounded up), or one an image (N).
        columns: images a row; by default the number that makes the grid about square, or N / number
            of captions where that is whole.
        title: a heading, or `""`.
        max_size: images whose longer side is larger are reduced to it, for contact sheets.
        text_size: of captions, in pixels.
        resample: how they are enlarged; `nearest` shows the pixels as they are.

    Returns:
        An RGB image.

    Raises:
        ValueError: not images, no image, or a number of captions that fits neither rows nor cells.
    """
    cells = enlarge(images, resample=resample)
    if max_size is not None and max(cells[0].size) > max_size:
        if MIN_SIZE > max_size:  # the cells are those of the images themselves
            cells = [Image.fromarray(image) for image in images]
        for cell in cells:
            cell.thumbnail((max_size, max_size), Image.Resampling.LANCZOS)
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
        draw_strip(
            cells[start : start + columns],
            notes=[] if per_row else captions[start : start + columns],
            caption=captions[row] if per_row else "",
            text_size=text_size,
        )
        for row, start in enumerate(starts)
    ]
    return draw_page([[row] for row in rows], title=title, text_size=text_size)


def before_after_grid(
    before: np.ndarray,
    after: np.ndarray,
    captions: Sequence[str],
    *,
    scores_before: np.ndarray | None = None,
    scores_after: np.ndarray | None = None,
    title: str = "",
) -> Image.Image:
    """Draw pairs of images, before and after training, at the same prompts and seeds.

    Args:
        before: uint8 [P * G, H, W, 3], prompt by prompt.
        after: the same shape, the same order.
        captions: P prompts; P divides the number of images.
        scores_before: float [P * G], written under the images.
        scores_after: the same for `after`.
        title: a heading, or `""`.

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
        cells = enlarge(images)
        sides.append((cells, [] if scores is None else [f"{score:.3f}" for score in scores]))
    panels = []
    for row, caption in enumerate(captions):
        part = slice(row * group, (row + 1) * group)
        cells = [cell for side, _ in sides for cell in side[part]]
        notes = [note for _, side in sides for note in (side[part] or [""] * group)]
        heads = {0: "before", group: "after"}
        panels.append(draw_strip(cells, notes=notes, caption=caption, heads=heads, split=group))
    return draw_page(pack(panels), title=title)


def pack(panels: Sequence[Image.Image]) -> list[Sequence[Image.Image]]:
    """Lay panels of one width out in rows: as many across as fit a page, as even as may be."""
    width = panels[0].width + 2 * _PADDING
    across = min(len(panels), max(1, (_MAX_WIDTH - 2 * _MARGIN) // width))
    across = -(-len(panels) // -(-len(panels) // across))
    return [panels[start : start + across] for start in range(0, len(panels), across)]


def _default_columns(count: int, captions: Sequence[str] | None) -> int:
    if captions and len(captions) < count and count % len(captions) == 0:
        return count // len(captions)
    return int(np.ceil(np.sqrt(count)))


def enlarge(images: np.ndarray, *, resample: Resample = "lanczos") -> list[Image.Image]:
    """Return images as Pillow ones, the shorter side at least `MIN_SIZE` by a whole factor."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"images are {images.dtype} of shape {images.shape}, expected uint8 [N, H, W, 3], N > 0"
        )
    _, height, width, _ = images.shape
    factor = max(1, -(-MIN_SIZE // min(height, width)))
    method = Image.Resampling.NEAREST if resample == "nearest" else Image.Resampling.LANCZOS
    size = (width * factor, height * factor)
    return [Image.fromarray(image).resize(size, method) for image in images]


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


def draw_strip(
    cells: Sequence[Image.Image],
    *,
    notes: Sequence[str] = (),
    caption: str = "",
    heads: Mapping[int, str] | None = None,
    split: int = 0,
    text_size: int = TEXT_SIZE,
    note_colors: Sequence[tuple[int, int, int]] = (),
) -> Image.Image:
    """Draw cells side by side: heads above, a note under each, a caption under all.

    `heads` is the index of a cell to the text that begins above it; `split` is the index of the
    cell before which the gap is wide. `note_colors` has one color a note; gray without. A note that
    is `RIGHT` or `WRONG` is drawn as a tick or a cross, which Pillow's font lacks.
    """
    heads = heads or {}
    written = [caption, *heads.values(), *(note for note in notes if note not in _MARKS)]
    text, small = (font_for(written, size) for size in (text_size, round(text_size * _SMALL)))
    cell_width, cell_height = cells[0].size
    lefts = [
        1 + index * (cell_width + _GAP) + (_MIDDLE - _GAP if split and index >= split else 0)
        for index in range(len(cells))
    ]
    width = lefts[-1] + cell_width + 1
    note_lines = [_wrap(note, small, cell_width) for note in notes]
    caption_lines = _wrap(caption, text, width)
    note_rows = max(map(len, note_lines), default=0)
    starts = sorted(heads)
    ends = [*(lefts[index] - _GAP for index in starts[1:]), width]
    head_lines = {
        index: _wrap(heads[index], small, end - lefts[index])
        for index, end in zip(starts, ends, strict=False)
    }
    head_rows = max(map(len, head_lines.values()), default=0)
    top = head_rows * _line_height(small) + 3 if heads else 1
    below = top + cell_height + 4
    caption_top = below + note_rows * _line_height(small)
    height = caption_top + len(caption_lines) * _line_height(text)
    strip = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(strip)
    for index, lines in head_lines.items():
        for row, line in enumerate(lines):
            place = (lefts[index] - 1, row * _line_height(small))
            draw.text(place, line, fill=_GRAY, font=small)
    for left, cell in zip(lefts, cells, strict=True):
        frame = (left - 1, top - 1, left + cell_width, top + cell_height)
        draw.rectangle(frame, outline=_FRAME)  # around, not over: a white picture needs an edge
        strip.paste(cell, (left, top))
    colors = note_colors or [_GRAY] * len(note_lines)
    for left, lines, color in zip(lefts, note_lines, colors, strict=False):
        for row, line in enumerate(lines):
            place = (left - 1, below + row * _line_height(small))
            if line in _MARKS:
                points = [
                    (place[0] + small.size * x, place[1] + small.size * y) for x, y in _MARKS[line]
                ]
                draw.line(points, fill=color, width=max(2, round(small.size / 6)))
            else:
                draw.text(place, line, fill=color, font=small)
    for row, line in enumerate(caption_lines):
        draw.text((0, caption_top + row * _line_height(text)), line, fill=_INK, font=text)
    return strip


def draw_page(
    rows: Sequence[Sequence[Image.Image]], *, title: str, text_size: int = TEXT_SIZE
) -> Image.Image:
    """Lay strips out in rows on a white page with margins and a heading."""
    font = font_for([title], round(text_size * _LARGE))
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
