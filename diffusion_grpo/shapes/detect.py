"""Pixels to objects: what stands where in a picture of the embedded world, with no learning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.shapes.render import (
    CROSS_ARM,
    SQUARE_HALF,
    STAR_RADII,
    TRIANGLE_RADIUS,
    signed_distance,
)
from diffusion_grpo.shapes.scenes import IMAGE_SIZE, PALETTE, SHAPES, TINTS

# Areas at radius 1, in the order of SHAPES: a component's area then tells its radius.
AREAS = np.array(
    [
        np.pi,
        4 * SQUARE_HALF**2,
        0.75 * np.sqrt(3) * TRIANGLE_RADIUS**2,
        5 * STAR_RADII[0] * STAR_RADII[1] * np.sin(np.pi / 5),
        8 * CROSS_ARM[0] * CROSS_ARM[1] - 4 * CROSS_ARM[1] ** 2,
    ],
    np.float32,
)
# Overlap with the best template below which a component has no known shape, in the order of SHAPES.
# Compact shapes overlap well with impostors (a diamond with a circle: .84), slender ones do not.
MIN_SHAPE_IOU = np.array([0.865, 0.855, 0.80, 0.76, 0.75], np.float32)
RADIUS_RANGE = (5.5, 15.0)  # pixels; a component outside has no known shape either
SIZE_BOUNDARY = 9.5  # pixels; small objects are below, large ones above

_PALETTE = np.array(list(PALETTE.values()), np.float32)
_TINTS = np.array(list(TINTS.values()), np.float32)
_UNKNOWN = len(PALETTE)  # class of foreground pixels of no palette color
_MAX_RESIDUAL = 62.0  # RGB distance of a pixel from the line background - color
_MAX_COLOR_ERROR = 62.0  # RGB distance of an object's inner pixels from its color
_MAX_TINT_ERROR = 40.0  # RGB distance of the background from the nearest tint
_PREVAILING = 0.75  # share of a region's inner pixels that decides its color
_EDGE_SLOPE = np.float32(0.8)  # coverage a pixel across an edge, after smoothing and steepening
# Of a pixel outside of all objects, the differences from the background in hue and in brightness
# (RGB distance from gray, levels of gray) above which it is no longer plain background. Light,
# ripples and shadows stay below them in all but a few pixels of a picture.
_GHOST_HUE = 16.0
_GHOST_LIGHT = 24.0
_MAX_SHADING = 0.15  # by which an object's inside is darker or lighter than its mean color
_MAX_FOREIGN = 50.0  # RGB distance of an object's inner pixel from the nearest shade of that
_MIN_AREA = 16  # pixels; smaller components are specks
_PATCH = 40  # pixels; the window in which a component is compared with the templates
_PIXELS = IMAGE_SIZE * IMAGE_SIZE


@dataclass(frozen=True)
class Detections:
    """What was found in `B` pictures: `M` objects in all, and each picture's background.

    Attributes:
        image: Which picture an object is in, ascending, int `[M]`.
        shape: Index into `SHAPES`, -1 if like none of them, int `[M]`.
        shape_iou: Overlap with the best template, float32 `[M]`.
        color: Index into `COLORS`, -1 if like none of them, int `[M]`.
        size: Index into `SIZES`, int `[M]`.
        x: Centroid from the left edge in pixels, float32 `[M]`.
        y: Centroid from the top edge in pixels, float32 `[M]`.
        radius: In pixels, float32 `[M]`.
        background: Index into `BACKGROUNDS`, -1 if like none of them, int `[B]`.
        specks: Pixels that are neither background nor part of an object, int `[B]`: of components
            too small for one, of ghosts (fainter than an object, yet no light or shadow), and
            within an object but of another color.
    """

    image: np.ndarray
    shape: np.ndarray
    shape_iou: np.ndarray
    color: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    background: np.ndarray
    specks: np.ndarray


def check_images(images: np.ndarray) -> np.ndarray:
    """Return `images` if they are uint8 `[B, 64, 64, 3]`.

    Raises:
        UsageError: otherwise.
    """
    wanted = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
        raise UsageError(
            f"got images of type {images.dtype} and shape {list(images.shape)}, but the shapes "
            f"verifier reads uint8 [B, {IMAGE_SIZE}, {IMAGE_SIZE}, 3] only; use it with a model of "
            "the embedded world at its own resolution"
        )
    return images


def _smooth(images: np.ndarray) -> np.ndarray:
    """Blur with [1 2 1] / 4 along both axes (edges repeated): noise falls to 3/8."""
    padded = np.pad(images.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 16


def _background_color(pixels: np.ndarray) -> np.ndarray:
    """Median color of the pixels that are near the picture's median, float32 `[B, 1, 3]`."""
    # A quarter of the pixels is plenty for a median.
    sample = pixels.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)[:, ::2, ::2].reshape(
        len(pixels), IMAGE_SIZE**2 // 4, 3
    )
    # Objects are darker than the background, so the median is taken a little above the middle.
    first = np.partition(sample, 600, axis=1)[:, 600:601]
    near = np.abs(sample - first).max(axis=2) < 40
    inside = np.where(near[..., None], sample, np.float32(0)).sum(axis=1, keepdims=True)
    return inside / np.maximum(near.sum(axis=1), 1).astype(np.float32)[:, None, None]


def _classify_pixels(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the color that each pixel is a mixture of with the background, and how much of it.

    A pixel is p = b + a (c - b) at an object's edge, so the color is the line from the background
    that p is nearest to, and the coverage a the place on it.

    Args:
        pixels: RGB in 0..255, float32 `[B, N, 3]`.
        background: RGB, float32 `[B, 1, 3]`.

    Returns:
        Class (0 background, 1 + color, 9 unknown), int8 `[B, N]`, and coverage in [0, 1],
        float32 `[B, N]`.
    """
    offset = pixels - background
    lines = _PALETTE[None] - background
    squares = np.maximum((lines * lines).sum(axis=2), 1)[:, None]  # 0 if the background is a color
    dots = offset @ lines.transpose(0, 2, 1)
    along = np.clip(dots / squares, 0, 1.15)
    distance = (offset * offset).sum(axis=2)
    # Squared distance to each line, without the term |offset|² that all lines share.
    residual = along * (along * squares - 2 * dots)
    best = residual.argmin(axis=2)
    coverage = np.take_along_axis(along, best[..., None], axis=2)[..., 0]
    unlike = np.take_along_axis(residual, best[..., None], axis=2)[..., 0] + distance
    unknown = unlike > _MAX_RESIDUAL**2
    cls = np.where(unknown, _UNKNOWN + 1, np.where(coverage > 0.5, best + 1, 0)).astype(np.int8)
    # Steepening the edge discards shadows, gradients and noise on both sides of it.
    coverage = np.where(unknown, np.float32(1), np.clip((coverage - 0.2) / 0.6, 0, 1))
    return cls, coverage


def label_components(cls: np.ndarray, max_iterations: int = 64) -> np.ndarray:
    """Label 4-connected regions of equal class in a batch at once.

    Each pixel points to the smallest pixel index known in its region; neighbors exchange pointers
    and pointers are followed, so the rounds grow with the logarithm of a region's length.

    Args:
        cls: Classes, 0 is background, int `[B, H, W]`.
        max_iterations: After which mazes are left in pieces.

    Returns:
        The index in its picture of each region's first pixel, int64 `[B, H, W]`; -1 for background.
    """
    b, h, w = cls.shape
    foreground = cls > 0
    across = (cls[:, :, 1:] == cls[:, :, :-1]) & foreground[:, :, 1:]
    down = (cls[:, 1:] == cls[:, :-1]) & foreground[:, 1:]
    label = np.broadcast_to(np.arange(h * w).reshape(1, h, w), (b, h, w)).copy()
    base = (np.arange(b) * (h * w)).reshape(b, 1)
    for _ in range(max_iterations):
        before = label.copy()
        np.minimum(label[:, :, 1:], label[:, :, :-1], out=label[:, :, 1:], where=across)
        np.minimum(label[:, :, 1:], label[:, :, :-1], out=label[:, :, :-1], where=across)
        np.minimum(label[:, 1:], label[:, :-1], out=label[:, 1:], where=down)
        np.minimum(label[:, 1:], label[:, :-1], out=label[:, :-1], where=down)
        for _ in range(2):
            label = label.reshape(-1)[label.reshape(b, -1) + base].reshape(b, h, w)
        if np.array_equal(label, before):
            break
    return np.where(foreground, label, -1)


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """Keep the pixels of a mask, bool `[B, H, W]`, whose 4 neighbors are in it too."""
    around = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    across = around[:, 1:-1, :-2] & around[:, 1:-1, 2:]
    return np.asarray(mask & across & around[:, :-2, 1:-1] & around[:, 2:, 1:-1])


def _settle_classes(cls: np.ndarray) -> np.ndarray:
    """Give all of a foreground region the class that prevails inside it, if one clearly does.

    Shaded rims look like other colors (dark yellow like orange); the inside decides. Regions with
    no such class, such as two objects that touch, keep their pixels' classes and so fall apart.

    Args:
        cls: Classes, 0 is background, int8 `[B, H, W]`.

    Returns:
        The same, settled.
    """
    foreground = cls > 0
    label = label_components(foreground)
    inside = _shrunk(foreground)
    flat = label.reshape(len(cls), -1) + np.arange(len(cls))[:, None] * label[0].size
    region = np.full(label.size, -1)
    roots = np.flatnonzero((flat.reshape(-1) == np.arange(label.size)) & foreground.reshape(-1))
    region[roots] = np.arange(len(roots))
    who = region[flat.reshape(-1)[inside.reshape(-1)]]
    classes = _UNKNOWN + 2
    votes = np.bincount(who * classes + cls[inside], minlength=len(roots) * classes)
    votes = votes.reshape(len(roots), classes)
    settled = votes.max(axis=1, initial=0) >= np.maximum(_PREVAILING * votes.sum(axis=1), 1)
    winner = np.where(settled, votes.argmax(axis=1), -1)
    new = cls.copy()
    pixels = flat.reshape(-1)[foreground.reshape(-1)]
    new[foreground] = np.where(winner[region[pixels]] > 0, winner[region[pixels]], cls[foreground])
    return new


def _grow(ids: np.ndarray) -> np.ndarray:
    """Give background pixels (-1) the id of a 4-neighbor, where there is one."""
    padded = np.pad(ids, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    near = np.maximum(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
    near = np.maximum(near, np.maximum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]))
    return np.where(ids < 0, near, ids)


def _ghosts(offset: np.ndarray) -> np.ndarray:
    """Say which pixels differ from the background by more than light does.

    Args:
        offset: pixels less the background's color, float32 `[B, N, 3]`.

    Returns:
        bool `[B, N]`.
    """
    light = offset.mean(axis=2)
    hue = np.square(offset - light[..., None]).sum(axis=2)
    return np.asarray((hue > _GHOST_HUE**2) | (np.abs(light) > _GHOST_LIGHT))


def _foreign(pixels: np.ndarray, core: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Say which pixels, two or more within an object's edge, are no shade of its mean color.

    Args:
        pixels: RGB, float32 `[B, N, 3]`.
        core: index of each pixel's object, -1 if none, int `[B, H, W]`.
        colors: mean color of each object, `[M, 3]`.

    Returns:
        bool `[B, N]`.
    """
    inside = _shrunk(_shrunk(core >= 0))
    found = np.zeros(inside.shape, bool)
    rgb = pixels.reshape(*inside.shape, 3)[inside]
    color = colors[core[inside]]
    shade = (rgb * color).sum(axis=1) / np.maximum((color * color).sum(axis=1), 1)
    shade = np.clip(shade, 1 - _MAX_SHADING, 1 + _MAX_SHADING)
    found[inside] = np.square(rgb - shade[:, None] * color).sum(axis=1) > _MAX_FOREIGN**2
    return found.reshape(len(pixels), -1)


def _match_templates(
    weights: np.ndarray, x: np.ndarray, y: np.ndarray, area: np.ndarray
) -> np.ndarray:
    """Overlap Σ min(a, t) / Σ max(a, t) of coverages with each shape of the same area and centroid.

    Args:
        weights: Coverages, float32 `[M, p, p]`.
        x: Columns relative to the centroids, float32 `[M, 1, p]`.
        y: Rows relative to the centroids, float32 `[M, p, 1]`.
        area: In pixels, float32 `[M]`.

    Returns:
        float32 `[M, 5]`.
    """
    total = weights.sum(axis=(1, 2))
    overlaps = []
    for shape, unit in zip(SHAPES, AREAS, strict=True):
        radius = np.sqrt(area / unit)[:, None, None]
        template = np.clip(0.5 - _EDGE_SLOPE * signed_distance(shape, x, y, radius), 0, 1)
        common = np.minimum(weights, template).sum(axis=(1, 2))
        overlaps.append(common / (total + template.sum(axis=(1, 2)) - common + 1e-6))
    return np.stack(overlaps, axis=1).astype(np.float32)


def _detect(images: np.ndarray) -> Detections:
    """Find the objects of one chunk of pictures."""
    b = len(images)
    pixels = _smooth(images).reshape(b, _PIXELS, 3)
    backdrop = _background_color(pixels)
    cls, coverage = _classify_pixels(pixels, backdrop)

    cls = _settle_classes(cls.reshape(b, IMAGE_SIZE, IMAGE_SIZE))
    label = label_components(cls).reshape(b, _PIXELS)
    flat = (label + (np.arange(b) * _PIXELS)[:, None])[label >= 0]
    sizes = np.bincount(flat, minlength=b * _PIXELS)
    roots = np.flatnonzero(sizes >= _MIN_AREA)
    specks = np.where(sizes < _MIN_AREA, sizes, 0).reshape(b, _PIXELS).sum(axis=1)
    image = roots // _PIXELS
    known = cls.reshape(-1)[roots].astype(np.int64) - 1

    # Number objects 0..M-1 on the pixel grid and let each take the soft edge around it.
    number = np.full(b * _PIXELS + 1, -1)
    number[roots] = np.arange(len(roots))
    index = np.where(label >= 0, label + (np.arange(b) * _PIXELS)[:, None], b * _PIXELS)
    core = number[index].reshape(b, IMAGE_SIZE, IMAGE_SIZE)
    ids = _grow(_grow(core)).reshape(-1)
    owned = np.flatnonzero(ids >= 0)
    plain = (cls.reshape(b, _PIXELS) == 0) & (ids.reshape(b, _PIXELS) < 0)
    ghosts = _shrunk((_ghosts(pixels - backdrop) & plain).reshape(cls.shape))  # noise has no inside
    specks = specks + ghosts.sum(axis=(1, 2))
    who, weight = ids[owned], coverage.reshape(-1)[owned].astype(np.float64)
    count = len(roots)
    area = np.bincount(who, weight, count)
    column, row = owned % IMAGE_SIZE + 0.5, owned % _PIXELS // IMAGE_SIZE + 0.5
    x = np.bincount(who, weight * column, count) / np.maximum(area, 1e-6)
    y = np.bincount(who, weight * row, count) / np.maximum(area, 1e-6)

    # The color is judged where an object covers the pixel entirely.
    inner = weight >= 0.999
    rgb = pixels.reshape(-1, 3)[owned]
    mean = np.stack([np.bincount(who, inner * rgb[:, c], count) for c in range(3)], axis=1)
    # Not in place: where there is no object at all, bincount returns integers.
    mean = mean / np.maximum(np.bincount(who, inner, count), 1)[:, None]
    specks = specks + _foreign(pixels, core, mean).sum(axis=1)
    error = np.linalg.norm(mean - _PALETTE[np.minimum(known, _UNKNOWN - 1)], axis=1)
    color = np.where((known < _UNKNOWN) & (error <= _MAX_COLOR_ERROR), known, -1)

    steps = np.arange(_PATCH)
    left, top = (
        np.clip(np.rint(c).astype(np.int64) - _PATCH // 2, 0, IMAGE_SIZE - _PATCH) for c in (x, y)
    )
    rows, columns = (top[:, None] + steps)[:, :, None], (left[:, None] + steps)[:, None, :]
    place = image[:, None, None] * _PIXELS + rows * IMAGE_SIZE + columns
    mine = ids[place] == np.arange(count)[:, None, None]
    weights = np.where(mine, coverage.reshape(-1)[place], np.float32(0)).astype(np.float32)
    dx = (columns + 0.5 - x[:, None, None]).astype(np.float32)
    dy = (rows + 0.5 - y[:, None, None]).astype(np.float32)
    overlap = _match_templates(weights, dx, dy, area.astype(np.float32))
    best = overlap.argmax(axis=1)
    iou = overlap.max(axis=1, initial=0)
    radius = np.sqrt(area / AREAS[best]).astype(np.float32)
    low, high = RADIUS_RANGE
    fits = (iou >= MIN_SHAPE_IOU[best]) & (radius >= low) & (radius <= high)

    tint_error = np.linalg.norm(backdrop - _TINTS[None], axis=2)
    # Tints differ in hue, light and gradients in brightness: compare without the latter.
    chroma = backdrop - backdrop.mean(axis=2, keepdims=True)
    tint_chroma = _TINTS - _TINTS.mean(axis=1, keepdims=True)
    tint = np.linalg.norm(chroma - tint_chroma[None], axis=2).argmin(axis=1)
    return Detections(
        image=image,
        shape=np.where(fits, best, -1),
        shape_iou=iou,
        color=color,
        size=(radius >= SIZE_BOUNDARY).astype(np.int64),
        x=x.astype(np.float32),
        y=y.astype(np.float32),
        radius=radius,
        background=np.where(tint_error.min(axis=1) <= _MAX_TINT_ERROR, tint, -1),
        specks=specks.astype(np.int64),
    )


def detect(images: np.ndarray, *, chunk: int = 32) -> Detections:
    """Find the objects in pictures of the embedded world.

    Args:
        images: uint8 `[B, 64, 64, 3]`.
        chunk: Pictures treated at a time; bounds the memory used.

    Returns:
        The objects and backgrounds.

    Raises:
        UsageError: if the pictures have another size or type.
    """
    check_images(images)
    starts = range(0, max(len(images), 1), chunk)
    parts = [_detect(images[start : start + chunk]) for start in starts]
    joined = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in Detections.__dataclass_fields__
    }
    offsets = np.repeat(np.array(list(starts)), [len(part.image) for part in parts])
    return Detections(**(joined | {"image": joined["image"] + offsets}))
