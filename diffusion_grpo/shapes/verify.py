"""The gold judge of the embedded world: does a picture show exactly what its caption says?

From the pixels alone, with fixed rules; each part of a caption is judged, as GenEval reports them.

What it does not see, though the world has no such picture: an object too many that is fainter than
about a quarter of its color, or that another hides or has the color of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.shapes.captions import ObjectSpec, Requirement, parse
from diffusion_grpo.shapes.detect import Detections, detect
from diffusion_grpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    relation_of,
)

PARTS = ("count", "shape", "color", "size", "position", "background")

MAX_SPECKS = 28  # pixels that may be neither background nor part of an object
MIN_OFFSET = 5.0  # pixels between the centers along the axis of a relation
_CANDIDATES = 5  # objects considered in a picture with too many; the largest ones
_PARTIAL = 0.7  # most partial credit a false picture gets
_EXTRA_PENALTY = 0.1  # taken off for each object too many


@dataclass(frozen=True)
class Verdict:
    """What the judge says of `B` pictures.

    Attributes:
        passed: Whether the picture shows exactly what its caption says, bool `[B]`.
        score: 1 if passed, else partial credit in [0, 0.7], float32 `[B]`.
        parts: For each of `PARTS` whether it holds, bool `[B]`; true where it is not asked.
        asked: For each of `PARTS` whether the caption asks for it, bool `[B]`.
    """

    passed: np.ndarray
    score: np.ndarray
    parts: dict[str, np.ndarray]
    asked: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Found:
    """One detected object, in the words of the captions (None: like nothing known)."""

    shape: str | None
    color: str | None
    size: str
    x: float
    y: float
    radius: float


def _found_objects(found: Detections, count: int) -> list[list[_Found]]:
    """List the objects of each picture, the largest first."""
    result: list[list[_Found]] = [[] for _ in range(count)]
    columns = zip(
        *(found.image.tolist(), found.shape.tolist(), found.color.tolist(), found.size.tolist()),
        *(found.x.tolist(), found.y.tolist(), found.radius.tolist()),
        strict=True,
    )
    for image, shape, color, size, x, y, radius in columns:
        result[image].append(
            _Found(
                SHAPES[shape] if shape >= 0 else None,
                COLORS[color] if color >= 0 else None,
                SIZES[size],
                *(x, y, radius),
            )
        )
    for objects in result:
        objects.sort(key=lambda o: -o.radius)
    return result


def _slot_hits(spec: ObjectSpec, found: _Found | None) -> tuple[bool, bool, bool]:
    """Whether shape, color and size are as asked; what is not asked holds if there is an object.

    An object of no palette color never has the right color, even where any color would do.
    """
    if found is None:
        return False, False, False
    color = found.color is not None and spec.color in (None, found.color)
    return found.shape == spec.shape, color, spec.size in (None, found.size)


def _relation_holds(relation: str, first: _Found, second: _Found) -> bool:
    """Whether `first` is clearly on the stated side of `second`, by the longer axis."""
    dx, dy = second.x - first.x, second.y - first.y
    seen = RELATIONS[int(relation_of(np.array(dx), np.array(dy)))]
    return seen == relation and max(abs(dx), abs(dy)) >= MIN_OFFSET


def _judge_one(
    stated: Requirement, objects: list[_Found], tint: int, specks: int
) -> tuple[dict[str, bool], float]:
    """Judge one picture by the assignment of objects to the caption that suits it best."""
    specs = stated.expanded()
    extra = len(objects) - len(specs)
    candidates: list[_Found | None] = [*objects[:_CANDIDATES]]
    candidates += [None] * (len(specs) - len(candidates))
    # A picture must have one of the world's backgrounds, whether or not the caption names it.
    tinted = tint >= 0 and stated.background in (None, BACKGROUNDS[tint])
    parts: dict[str, bool] = {}
    best = -1.0
    for chosen in permutations(candidates, len(specs)):
        hits = [_slot_hits(spec, o) for spec, o in zip(specs, chosen, strict=True)]
        credits = [h[0] for h in hits] + [h[1] for h in hits]
        credits += [h[2] for h, spec in zip(hits, specs, strict=True) if spec.size]
        placed = True
        if stated.relation:
            a, b = chosen[:2]
            placed = a is not None and b is not None and _relation_holds(stated.relation, a, b)
            # A relation between the wrong objects is worth nothing.
            credits.append(placed and all(h[0] for h in hits))
        if stated.background:
            credits.append(tinted)
        credit = sum(credits) / len(credits)
        if credit > best:
            best = credit
            shape, color, size = (all(h[i] for h in hits) for i in range(3))
            count = extra == 0 and specks <= MAX_SPECKS
            values = (count, shape, color, size, placed, tinted)
            parts = dict(zip(PARTS, values, strict=True))
    if all(parts.values()):
        return parts, 1.0
    return parts, max(0.0, _PARTIAL * best - _EXTRA_PENALTY * max(extra, 0))


def verify(images: np.ndarray, captions: Sequence[str | Requirement]) -> Verdict:
    """Judge pictures by their captions.

    Partial credit is 0.7 × the share of what was asked that is there, less 0.1 for each object too
    many. Asked are each object's shape and color (any of the palette where none is named, so that
    an object of another shape has that half), and its size, the relation and the background where
    they are named.

    Args:
        images: uint8 `[B, 64, 64, 3]`.
        captions: `B` captions of this world, or what they require.

    Returns:
        The verdict.

    Raises:
        UsageError: if there are not as many captions as pictures, a caption is not of this world,
            or the pictures are not 64×64 uint8.
    """
    if len(images) != len(captions):
        raise UsageError(
            f"got {len(images)} images and {len(captions)} captions; expected one caption an image"
        )
    parsed = {c: parse(c) for c in set(captions) if isinstance(c, str)}
    stated = [parsed[c] if isinstance(c, str) else c for c in captions]
    found = detect(images)
    objects = _found_objects(found, len(images))
    tints, specks = found.background.tolist(), found.specks.tolist()
    judged = [_judge_one(*case) for case in zip(stated, objects, tints, specks, strict=True)]

    always = np.ones(len(images), bool)
    asked = {
        "count": always,
        "shape": always,
        "color": np.array([any(s.color for s in r.objects) for r in stated], bool),
        "size": np.array([any(s.size for s in r.objects) for r in stated], bool),
        "position": np.array([r.relation is not None for r in stated], bool),
        "background": np.array([r.background is not None for r in stated], bool),
    }
    return Verdict(
        passed=np.array([all(parts.values()) for parts, _ in judged], bool),
        score=np.array([score for _, score in judged], np.float32),
        parts={name: np.array([parts[name] for parts, _ in judged], bool) for name in PARTS},
        asked=asked,
    )
