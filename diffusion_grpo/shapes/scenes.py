"""Random scenes of one to three objects, drawn for a whole batch at once.

A scene is plain numbers (what, where, on which background) and the few bits that decide what its
caption says. `render.py` turns scenes into pixels, `captions.py` into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np

from diffusion_grpo.errors import UsageError, suggest

Split = Literal["train", "heldout", "all"]

IMAGE_SIZE = 64
MAX_OBJECTS = 3
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = (
    "single_object",
    "two_object",
    "counting",
    "colors",
    "position",
    "color_attribution",
)

# Saturated or dark against every background, and at least 95 RGB units from one another, so that a
# lossy autoencoder cannot turn one into the other.
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (208, 28, 38),
    "orange": (243, 122, 8),
    "yellow": (252, 216, 22),
    "green": (32, 148, 62),
    "blue": (30, 92, 216),
    "purple": (122, 40, 164),
    "pink": (244, 98, 184),
    "black": (30, 30, 38),
}
COLORS = tuple(PALETTE)

# Light tints with names that are not object colors, so that no caption is ambiguous.
TINTS: dict[str, tuple[int, int, int]] = {
    "cream": (250, 240, 212),
    "mint": (208, 240, 218),
    "sky": (206, 229, 250),
    "rose": (252, 216, 222),
    "lilac": (227, 214, 248),
    "gray": (223, 224, 226),
}
BACKGROUNDS = tuple(TINTS)

# Object radii in pixels for each size, and for large objects that share a picture with two others.
RADII = {"small": (7.0, 8.5), "large": (10.5, 12.8)}
CROWDED_LARGE_RADII = (10.5, 11.3)
# In units of the radius, for each shape: the farthest point from the center, and how far the shape
# reaches to either side, up and down.
EXTENT = np.array([1.0, 1.245, 1.28, 1.25, 1.082], np.float32)
SIDEWAYS = np.array([1.0, 0.88, 1.109, 1.189, 1.02], np.float32)
UPWARD = np.array([1.0, 0.88, 1.28, 1.25, 1.02], np.float32)
DOWNWARD = np.array([1.0, 0.88, 0.64, 1.012, 1.02], np.float32)

# How often each task is drawn, and how often its caption names sizes, colors and the background.
TASK_SHARES = {
    "single_object": 0.12,
    "two_object": 0.13,
    "counting": 0.18,
    "colors": 0.19,
    "position": 0.19,
    "color_attribution": 0.19,
}
_SAY_SIZE = np.array([0.6, 0.35, 0.25, 0.4, 0.1, 0.15])
_SAY_COLOR = np.array([0.0, 0.0, 0.6, 1.0, 0.7, 1.0])
_SAY_BACKGROUND = np.array([0.35, 0.15, 0.1, 0.2, 0.0, 0.0])

_GAP = 2.0  # pixels kept free between two objects
_MARGIN = 1.5  # pixels kept free at the picture's edge
_CLEAR_OFFSET = 14.0  # pixels between centers along the axis of a stated relation
_CLEAR_SLOPE = 0.7  # the other axis' offset, at most, relative to it

# One caption in ten is held out; colorless single objects are few, so three in ten of them are.
_HELDOUT_PER_MILLE = 100
_HELDOUT_PER_MILLE_PLAIN = 300


@dataclass(frozen=True)
class Scenes:
    """A batch of `n` scenes; slots are the up to three objects, in the caption's order.

    Attributes:
        task: Index into `TASKS`, int8 `[n]`.
        shape: Index into `SHAPES`, int8 `[n, 3]`.
        color: Index into `COLORS`, int8 `[n, 3]`.
        size: Index into `SIZES`, int8 `[n, 3]`.
        present: Which slots hold an object, bool `[n, 3]`.
        x: Center, pixels from the left edge, float32 `[n, 3]`.
        y: Center, pixels from the top edge, float32 `[n, 3]`.
        radius: Radius in pixels, float32 `[n, 3]`.
        relation: Index into `RELATIONS` of object 0 to object 1, int8 `[n]`; -1 if none is stated.
        background: Index into `BACKGROUNDS`, int8 `[n]`.
        texture: Seven numbers in [0, 1) for light and texture of the background, float32 `[n, 7]`.
        say_size: Whether the caption names sizes, bool `[n]`.
        say_color: Whether the caption names colors, bool `[n]`.
        say_background: Whether the caption names the background, bool `[n]`.
    """

    task: np.ndarray
    shape: np.ndarray
    color: np.ndarray
    size: np.ndarray
    present: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    relation: np.ndarray
    background: np.ndarray
    texture: np.ndarray
    say_size: np.ndarray
    say_color: np.ndarray
    say_background: np.ndarray

    def __len__(self) -> int:
        """Number of scenes."""
        return len(self.task)

    def take(self, index: np.ndarray | slice) -> Scenes:
        """Return the scenes at `index` (integers, a mask or a slice)."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    """Join batches of scenes into one."""
    names = [f.name for f in fields(Scenes)]
    return Scenes(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def combination_key(objects: np.ndarray, count: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Number an attribute combination, whatever the order of its objects and their relation.

    Args:
        objects: Codes of the one or two described objects, int `[n, 2]` (see `object_code`); -1 in
            the second column if only one is described.
        count: How many of the object there are, int `[n]`.
        background: Index of the background, or -1 where it is not described, int `[n]`.

    Returns:
        uint64 `[n]`, equal exactly for equal combinations.
    """
    ordered = np.sort(objects.astype(np.int64) + 1, axis=1)
    key = (ordered[:, 0] * 256 + ordered[:, 1]) * 4 + count.astype(np.int64)
    return (key * 8 + background.astype(np.int64) + 1).astype(np.uint64)


def object_code(shape: np.ndarray, color: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Number a described object; color or size -1 means that it is not described."""
    sizes, colors = size.astype(np.int64) + 1, color.astype(np.int64) + 1
    return (sizes * (len(COLORS) + 1) + colors) * len(SHAPES) + shape.astype(np.int64)


def is_heldout(key: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """Say which combinations are held out from training, by a fixed hash (splitmix64).

    Args:
        key: From `combination_key`, uint64 `[n]`.
        plain: Whether it is one object with no color named, bool `[n]`.

    Returns:
        bool `[n]`.
    """
    with np.errstate(over="ignore"):
        z = key + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    bound = np.where(plain, _HELDOUT_PER_MILLE_PLAIN, _HELDOUT_PER_MILLE)
    return (z % np.uint64(1000)).astype(np.int64) < bound


def heldout_mask(scenes: Scenes) -> np.ndarray:
    """Say which scenes have a caption whose combination is held out, bool `[n]`."""
    color = np.where(scenes.say_color[:, None], scenes.color, -1)
    size = np.where(scenes.say_size[:, None], scenes.size, -1)
    code = object_code(scenes.shape, color, size)
    counting = scenes.task == TASKS.index("counting")
    pair = scenes.present[:, 1] & ~counting
    objects = np.stack([code[:, 0], np.where(pair, code[:, 1], -1)], axis=1)
    count = np.where(counting, scenes.present.sum(axis=1), 1)
    background = np.where(scenes.say_background, scenes.background, -1)
    plain = scenes.task == TASKS.index("single_object")
    return is_heldout(combination_key(objects, count, background), plain)


def _draw_contents(rng: np.random.Generator, n: int, task_ids: np.ndarray) -> dict[str, np.ndarray]:
    """Draw everything but the places of the objects."""
    shares = np.array([TASK_SHARES[TASKS[i]] for i in task_ids])
    task = rng.choice(task_ids, size=n, p=shares / shares.sum())
    counting = task == TASKS.index("counting")
    single = (task == TASKS.index("single_object")) | (task == TASKS.index("colors"))
    number = np.where(counting, rng.integers(2, 4, n), np.where(single, 1, 2))

    say_size = rng.random(n) < _SAY_SIZE[task]
    say_color = rng.random(n) < _SAY_COLOR[task]
    say_background = rng.random(n) < _SAY_BACKGROUND[task]

    # Shapes and, where they are named, colors of a pair differ; a group shares what is named.
    shape = np.argsort(rng.random((n, len(SHAPES))), axis=1)[:, :MAX_OBJECTS]
    distinct = np.argsort(rng.random((n, len(COLORS))), axis=1)[:, :MAX_OBJECTS]
    color = np.where(say_color[:, None], distinct, rng.integers(0, len(COLORS), (n, MAX_OBJECTS)))
    size = rng.integers(0, len(SIZES), (n, MAX_OBJECTS))
    alike = counting[:, None]
    shape = np.where(alike, shape[:, :1], shape)
    color = np.where(alike & (say_color | (rng.random(n) < 0.5))[:, None], color[:, :1], color)
    size = np.where(alike & (say_size | (rng.random(n) < 0.5))[:, None], size[:, :1], size)

    low = np.where(size == 0, RADII["small"][0], RADII["large"][0])
    large_high = np.where(number == 3, CROWDED_LARGE_RADII[1], RADII["large"][1])
    high = np.where(size == 0, RADII["small"][1], large_high[:, None])
    radius = low + (high - low) * rng.random((n, MAX_OBJECTS))
    present = np.arange(MAX_OBJECTS)[None, :] < number[:, None]
    return {
        "task": task.astype(np.int8),
        "shape": shape.astype(np.int8),
        "color": color.astype(np.int8),
        "size": size.astype(np.int8),
        "present": present,
        "radius": radius.astype(np.float32),
        "background": rng.integers(0, len(BACKGROUNDS), n).astype(np.int8),
        "texture": rng.random((n, 7), dtype=np.float32),
        "say_size": say_size,
        "say_color": say_color,
        "say_background": say_background,
    }


def _place(
    rng: np.random.Generator, contents: dict[str, np.ndarray], tries: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Draw centers until no two objects touch and stated relations are clear."""
    n = len(contents["task"])
    shape, radius, present = contents["shape"], contents["radius"], contents["present"]
    extent, side = EXTENT[shape] * radius, SIDEWAYS[shape] * radius
    up, down = UPWARD[shape] * radius, DOWNWARD[shape] * radius
    position = contents["task"] == TASKS.index("position")
    x, y = np.zeros((2, n, MAX_OBJECTS), np.float32)
    pending = np.arange(n)
    while len(pending):
        u, v = rng.random((2, len(pending), tries, MAX_OBJECTS), dtype=np.float32)
        e, s, above, below = (a[pending][:, None] for a in (extent, side, up, down))
        xs = s + _MARGIN + u * (IMAGE_SIZE - 2 * (s + _MARGIN))
        ys = above + _MARGIN + v * (IMAGE_SIZE - above - below - 2 * _MARGIN)
        ok = np.ones((len(pending), tries), bool)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            dx, dy = xs[..., j] - xs[..., i], ys[..., j] - ys[..., i]
            # Apart are objects whose enclosing circles or bounding boxes are.
            apart = np.hypot(dx, dy) >= e[..., i] + e[..., j] + _GAP
            apart |= np.abs(dx) >= s[..., i] + s[..., j] + _GAP
            apart |= dy >= below[..., i] + above[..., j] + _GAP
            apart |= -dy >= below[..., j] + above[..., i] + _GAP
            ok &= apart | ~(present[pending, i] & present[pending, j])[:, None]
        dx, dy = np.abs(xs[..., 0] - xs[..., 1]), np.abs(ys[..., 0] - ys[..., 1])
        longer, shorter = np.maximum(dx, dy), np.minimum(dx, dy)
        clear = (longer >= _CLEAR_OFFSET) & (shorter <= _CLEAR_SLOPE * longer)
        ok &= clear | ~position[pending][:, None]
        found = ok.any(axis=1)
        first = ok.argmax(axis=1)
        rows = np.flatnonzero(found)
        x[pending[rows]] = xs[rows, first[rows]]
        y[pending[rows]] = ys[rows, first[rows]]
        pending = pending[~found]
        tries = min(2 * tries, 1024)  # the few that are left are crowded
    return x, y


def relation_of(dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Name the relation of A to B from the offset (B - A) by its longer axis: index int8."""
    horizontal = np.abs(dx) >= np.abs(dy)
    relation = np.where(horizontal, np.where(dx > 0, 0, 1), np.where(dy > 0, 2, 3))
    return relation.astype(np.int8)


def _draw(rng: np.random.Generator, n: int, task_ids: np.ndarray, split: Split) -> Scenes:
    """Draw up to `n` scenes of the split (contents are filtered before places are drawn)."""
    contents = _draw_contents(rng, n, task_ids)
    blank = np.zeros((n, MAX_OBJECTS), np.float32)
    none = np.full(n, -1, np.int8)
    scenes = Scenes(**contents, x=blank, y=blank, relation=none)
    if split != "all":
        keep = np.flatnonzero(heldout_mask(scenes) == (split == "heldout"))
        scenes = scenes.take(keep)
        contents = {name: getattr(scenes, name) for name in contents}
    x, y = _place(rng, contents)
    stated = scenes.task == TASKS.index("position")
    relation = np.where(stated, relation_of(x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]), -1)
    return Scenes(**contents, x=x, y=y, relation=relation.astype(np.int8))


def sample_scenes(
    rng: np.random.Generator,
    n: int,
    *,
    split: Split = "train",
    tasks: Sequence[str] | None = None,
) -> Scenes:
    """Draw `n` random scenes.

    Args:
        rng: Source of randomness.
        n: Number of scenes.
        split: `"train"`, `"heldout"` (combinations never trained on) or `"all"`.
        tasks: Restricts the scenes to these task types; all six, by `TASK_SHARES`, if None.

    Returns:
        The scenes.

    Raises:
        UsageError: for an unknown split or task.
    """
    if split not in ("train", "heldout", "all"):
        raise UsageError(f"split is {split!r}, expected 'train', 'heldout' or 'all'")
    for name in tasks or ():
        if name not in TASKS:
            known = ", ".join(TASKS)
            raise UsageError(f"unknown task {name!r}{suggest(name, TASKS)}; known tasks: {known}")
    task_ids = np.array([TASKS.index(t) for t in (tasks or TASKS)])
    # Enough spare draws that one pass usually suffices for the split.
    factor = {"train": 1.25, "heldout": 10.0, "all": 1.0}[split]
    parts: list[Scenes] = []
    while (missing := n - sum(map(len, parts))) > 0:
        draws = int(missing * factor) + (0 if split == "all" else 16)
        parts.append(_draw(rng, draws, task_ids, split))
    return concatenate(parts).take(slice(n)) if parts else _draw(rng, 0, task_ids, split)


def scene_batch(seed: int, step: int, n: int) -> Scenes:
    """Draw the batch of a training step, a function of `(seed, step)` alone (for resuming)."""
    return sample_scenes(np.random.default_rng([seed, step]), n, split="train")
