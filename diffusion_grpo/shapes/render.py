"""Scenes to pixels: signed distances, one-pixel anti-aliasing, a little light and texture."""

from __future__ import annotations

import numpy as np

from diffusion_grpo.shapes.scenes import (
    EXTENT,
    IMAGE_SIZE,
    MAX_OBJECTS,
    PALETTE,
    RADII,
    SHAPES,
    SIZES,
    TINTS,
    Scenes,
)

# Geometry in units of the radius. All shapes look about equally big at the same radius.
SQUARE_HALF = 0.88
TRIANGLE_RADIUS = 1.28  # circumscribed circle; the inscribed one is half of it
STAR_RADII = (1.25, 0.60)  # tips and notches
CROSS_ARM = (1.02, 0.36)  # half length and half width of a bar

_GLOW = 3.0  # pixels over which the contact shadow fades
_COLORS = np.array(list(PALETTE.values()), np.float32)
_TINTS = np.array(list(TINTS.values()), np.float32)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Signed distance in pixels to a shape's outline, negative inside.

    Exact within a pixel of an edge (what anti-aliasing needs); near outer corners it is the
    distance to the nearest edge line instead, so corners stay sharp.

    Args:
        shape: One of `SHAPES`.
        x: Offset from the center to the right, in pixels.
        y: Offset from the center downward, in pixels.
        radius: Radius in pixels.

    Returns:
        Distances in the broadcast shape of the arguments.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF * radius
    if shape == "triangle":
        slanted = np.float32(np.sqrt(0.75)) * np.abs(x) - np.float32(0.5) * y
        return np.maximum(slanted, y) - np.float32(0.5 * TRIANGLE_RADIUS) * radius
    if shape == "cross":
        a, b = np.abs(x), np.abs(y)
        length, width = CROSS_ARM
        longer, shorter = np.maximum(a, b), np.minimum(a, b)
        return np.maximum(longer - length * radius, shorter - width * radius)
    # Star: fold the plane into the half of the tip that a point belongs to: one edge remains.
    sector = np.float32(2 * np.pi / 5)
    angle = np.arctan2(np.abs(x), -y)
    angle = np.abs(angle - sector * np.rint(angle / sector))
    r = np.sqrt(x * x + y * y)
    tip, notch = STAR_RADII
    edge = np.array([notch * np.cos(sector / 2) - tip, notch * np.sin(sector / 2)])
    normal = (np.array([edge[1], -edge[0]]) / np.hypot(*edge)).astype(np.float32)
    along = r * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1])
    return along - np.float32(tip * normal[0]) * radius


def _backgrounds(scenes: Scenes) -> np.ndarray:
    """Tinted paper: a gradient in a random direction, a soft vignette, a faint ripple."""
    n = len(scenes)
    line = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    t = scenes.texture
    angle = np.float32(2 * np.pi) * t[:, 0]
    strength = 3 + 4 * t[:, 1]
    column = (strength * np.cos(angle))[:, None] * line - 2 * line**2
    row = (strength * np.sin(angle))[:, None] * line - 2 * line**2
    waves = np.float32(np.pi) * (2 + 4 * t[:, 2:4])
    wave_x = 1.5 * np.cos(waves[:, :1] * line + np.float32(2 * np.pi) * t[:, 4:5])
    wave_y = np.cos(waves[:, 1:] * line + np.float32(2 * np.pi) * t[:, 5:6])
    light = wave_y[:, :, None] * wave_x[:, None, :] + row[:, :, None] + column[:, None, :]
    tint = _TINTS[scenes.background] + 4 * (t[:, 6:7] - 0.5)
    return (light[..., None] + tint.reshape(n, 1, 1, 3)).astype(np.float32)


def _paint(
    canvas: np.ndarray, scenes: Scenes, slot: int, shape: int, size: int, rows: np.ndarray
) -> None:
    """Paint the object in `slot` of the scenes `rows`, all of one shape and size, on the canvas."""
    radius = scenes.radius[rows, slot]
    # As wide as the largest of its kind: the shadow ends where it does whatever else is painted.
    largest = RADII[SIZES[size]][1]
    patch = int(min(IMAGE_SIZE, 2 * (np.ceil(EXTENT[shape] * largest + _GLOW) + 1)))
    left, top = (
        np.clip(np.floor(c[rows, slot]).astype(np.int32) - patch // 2, 0, IMAGE_SIZE - patch)
        for c in (scenes.x, scenes.y)
    )
    steps = np.arange(patch, dtype=np.int32)
    x = (left[:, None] + steps + np.float32(0.5) - scenes.x[rows, slot][:, None])[:, None, :]
    y = (top[:, None] + steps + np.float32(0.5) - scenes.y[rows, slot][:, None])[:, :, None]
    radius = radius[:, None, None]
    distance = signed_distance(SHAPES[shape], x, y, radius)

    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    shadow = np.clip(1 - distance / _GLOW, 0, 1)
    shadow = (1 - 0.09 * shadow * shadow)[..., None]
    # Light falls from the upper left; a thin rim is darker.
    light = 1 - 0.09 * (x + y) / radius - 0.14 * np.clip(distance + 2, 0, 1)
    gloss = 10 * np.clip(1 - ((x + 0.35 * radius) ** 2 + (y + 0.4 * radius) ** 2) / radius**2, 0, 1)
    color = _COLORS[scenes.color[rows, slot]][:, None, None, :]
    paint = color * light[..., None] + gloss[..., None]

    index = (
        rows[:, None, None],
        (top[:, None] + steps)[:, :, None],
        (left[:, None] + steps)[:, None],
    )
    under = canvas[index] * shadow
    canvas[index] = under + cover * (paint - under)


def render(scenes: Scenes, *, chunk: int = 256) -> np.ndarray:
    """Render scenes.

    Args:
        scenes: `n` scenes.
        chunk: Scenes rendered at a time; bounds the memory used.

    Returns:
        Pictures, uint8 `[n, 64, 64, 3]`.
    """
    out = np.empty((len(scenes), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for start in range(0, len(scenes), chunk):
        part = scenes.take(slice(start, start + chunk))
        canvas = _backgrounds(part)
        for slot in range(MAX_OBJECTS):
            for shape in range(len(SHAPES)):
                for size in (0, 1):
                    here = part.present[:, slot] & (part.shape[:, slot] == shape)
                    rows = np.flatnonzero(here & (part.size[:, slot] == size))
                    if len(rows):
                        _paint(canvas, part, slot, shape, size, rows)
        np.clip(np.rint(canvas), 0, 255, out=canvas)
        out[start : start + chunk] = canvas.astype(np.uint8)
    return out
