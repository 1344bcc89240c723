"""Scenes to words and back: a small grammar over GenEval's six task types.

```
a [small|large] [COLOR] SHAPE                                  single_object, colors
two|three [small|large] [COLOR] SHAPES                         counting
a … SHAPE and a … SHAPE                                        two_object, color_attribution
a … SHAPE left of|right of|above|below a … SHAPE               position
each but the last optionally followed by:  on a TINT background
```
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    Scenes,
    Split,
    combination_key,
    is_heldout,
    object_code,
)

NUMBERS = {2: "two", 3: "three"}
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
_SINGULARS = {plural: shape for shape, plural in PLURALS.items()}
_OPPOSITE: dict[str, str] = dict(
    zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True)
)

# Every word of the grammar; the tokenizer has one token for each.
VOCABULARY = (
    *("a", "an", "and", "on", "of", "left", "right", "above", "below", "background"),
    *NUMBERS.values(),
    *SIZES,
    *COLORS,
    *SHAPES,
    *PLURALS.values(),
    *BACKGROUNDS,
)


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says of one object; None where it says nothing."""

    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Requirement:
    """What a caption asks of a picture: exactly these objects and no other.

    Attributes:
        task: One of `TASKS`.
        objects: One object, or two different ones.
        count: How many of the object there must be (1, or 2 to 3 for a single spec).
        relation: Of the first object to the second, one of `RELATIONS`, or None.
        background: One of `BACKGROUNDS`, or None.
    """

    task: str
    objects: tuple[ObjectSpec, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    def expanded(self) -> tuple[ObjectSpec, ...]:
        """One spec for each object in the picture."""
        return self.objects * self.count if len(self.objects) == 1 else self.objects


def _phrase(spec: ObjectSpec, count: int) -> str:
    """Name an object: "a small red circle", "an orange star", "two stars"."""
    noun = spec.shape if count == 1 else PLURALS[spec.shape]
    words = [word for word in (spec.size, spec.color, noun) if word]
    article = ("an" if words[0][0] in "aeiou" else "a") if count == 1 else NUMBERS[count]
    return " ".join([article, *words])


def describe(requirement: Requirement) -> str:
    """Write the caption of a requirement; the inverse of `parse`."""
    phrases = [_phrase(spec, requirement.count) for spec in requirement.objects]
    text = f" {requirement.relation or 'and'} ".join(phrases)
    return text + (f" on a {requirement.background} background" if requirement.background else "")


def requirements(scenes: Scenes) -> list[Requirement]:
    """State what each scene's caption says, as structure."""
    result = []
    counts = scenes.present.sum(axis=1)
    columns = zip(
        *(scenes.shape.tolist(), scenes.color.tolist(), scenes.size.tolist()),
        *(scenes.task.tolist(), counts.tolist(), scenes.relation.tolist()),
        *(scenes.background.tolist(), scenes.say_color.tolist(), scenes.say_size.tolist()),
        scenes.say_background.tolist(),
        strict=True,
    )
    for shape, color, size, task, count, relation, background, colored, sized, tinted in columns:
        counting = TASKS[task] == "counting"
        specs = tuple(
            ObjectSpec(
                SHAPES[shape[i]],
                COLORS[color[i]] if colored else None,
                SIZES[size[i]] if sized else None,
            )
            for i in range(1 if counting else count)
        )
        result.append(
            Requirement(
                TASKS[task],
                specs,
                count if counting else 1,
                RELATIONS[relation] if relation >= 0 else None,
                BACKGROUNDS[background] if tinted else None,
            )
        )
    return result


def reverse(requirement: Requirement) -> Requirement:
    """Say the same with the two objects in the other order."""
    relation = _OPPOSITE[requirement.relation] if requirement.relation else None
    return dataclasses.replace(requirement, objects=requirement.objects[::-1], relation=relation)


def captions(scenes: Scenes, rng: np.random.Generator | None = None) -> list[str]:
    """Write a caption for each scene.

    Args:
        scenes: `n` scenes.
        rng: If given, half of the captions of two objects name them in the other order.

    Returns:
        `n` captions of at most 11 words.
    """
    stated = requirements(scenes)
    if rng is not None:
        flips = rng.random(len(stated)) < 0.5
        stated = [reverse(r) if flip else r for r, flip in zip(stated, flips, strict=True)]
    return [describe(r) for r in stated]


def _parse_object(words: Sequence[str], caption: str) -> tuple[ObjectSpec, int]:
    """Read "a small red circle" or "two stars"."""
    numbers = {"a": 1, "an": 1} | {word: count for count, word in NUMBERS.items()}
    if len(words) < 2 or words[0] not in numbers:
        raise UsageError(
            f"cannot read {' '.join(words)!r} in the caption {caption!r}: expected an object such "
            "as 'a red circle' or 'two small stars'"
        )
    count, rest = numbers[words[0]], list(words[1:])
    size = rest.pop(0) if rest[0] in SIZES else None
    color = rest.pop(0) if rest and rest[0] in COLORS else None
    nouns = {shape: shape for shape in SHAPES} if count == 1 else _SINGULARS
    if len(rest) != 1 or rest[0] not in nouns:
        # The first word that is not one of an object at its place.
        wrong = rest[1] if len(rest) > 1 and rest[0] in nouns else rest[0] if rest else words[-1]
        choices = [*SIZES, *COLORS, *nouns]
        what, hint = "misplaced", ""
        if wrong not in choices:
            what, hint = "unknown", suggest(wrong, choices)
        raise UsageError(
            f"{what} word {wrong!r} in the caption {caption!r}{hint}; "
            f"expected a size ({', '.join(SIZES)}), a color ({', '.join(COLORS)}), "
            f"then a shape ({', '.join(nouns)})"
        )
    return ObjectSpec(nouns[rest[0]], color, size), count


def parse(caption: str) -> Requirement:
    """Read a caption of this world.

    Args:
        caption: As `describe` writes it; case and spacing do not matter.

    Returns:
        What it asks for.

    Raises:
        UsageError: if it is not a caption of this world; names the first thing that is not.
    """
    text = " ".join(caption.lower().strip(" .").split())
    background = None
    if text.endswith(" background"):
        text, _, tint = text.removesuffix(" background").rpartition(" on a ")
        if tint not in BACKGROUNDS:
            raise UsageError(
                f"unknown background {tint!r} in the caption {caption!r}"
                f"{suggest(tint, BACKGROUNDS)}; expected one of {', '.join(BACKGROUNDS)}"
            )
        background = tint
    joint = next((j for j in (*RELATIONS, "and") if f" {j} " in text), None)
    relation = None if joint == "and" else joint
    parts = text.split(f" {joint} ") if joint else [text]
    read = [_parse_object(part.split(), caption) for part in parts]
    specs, counts = tuple(spec for spec, _ in read), [count for _, count in read]
    if len(specs) > 2 or (len(specs) == 2 and counts != [1, 1]):
        raise UsageError(
            f"the caption {caption!r} names too much: expected one kind of object, or two "
            "single ones"
        )
    colored = any(spec.color for spec in specs)
    if len(specs) == 2:
        if specs[0].shape == specs[1].shape:
            raise UsageError(f"the caption {caption!r} names two objects of the same shape")
        task = "position" if relation else "color_attribution" if colored else "two_object"
    else:
        task = "counting" if counts[0] > 1 else "colors" if colored else "single_object"
    return Requirement(task, specs, counts[0], relation, background)


def _index(names: Sequence[str], name: str | None) -> np.ndarray:
    """Number a name, -1 for None, as int `[1]`."""
    return np.array([names.index(name) if name else -1])


def split_of(caption: str | Requirement) -> Split:
    """Say whether a caption belongs to `"train"` or is `"heldout"`.

    Captions that differ only in the order of their objects or in their relation share a split.

    Raises:
        UsageError: if it is not a caption of this world.
    """
    stated = parse(caption) if isinstance(caption, str) else caption
    codes = [
        object_code(_index(SHAPES, o.shape), _index(COLORS, o.color), _index(SIZES, o.size))
        for o in stated.objects
    ]
    pair = np.stack([codes[0], codes[1] if len(codes) == 2 else np.array([-1])], axis=1)
    key = combination_key(pair, np.array([stated.count]), _index(BACKGROUNDS, stated.background))
    plain = np.array([stated.task == "single_object"])
    return "heldout" if is_heldout(key, plain)[0] else "train"


def metadata(caption: str) -> dict[str, Any]:
    """Describe a caption the way the prompt lists' JSONL files do.

    Raises:
        UsageError: if it is not a caption of this world.
    """
    stated = parse(caption)
    record: dict[str, Any] = {
        "prompt": caption,
        "task": stated.task,
        "objects": [dataclasses.asdict(spec) | {"count": stated.count} for spec in stated.objects],
    }
    if stated.relation:
        record["relation"] = stated.relation
    if stated.background:
        record["background"] = stated.background
    return record


def _other(rng: np.random.Generator, names: Sequence[str], *taken: str | None) -> str:
    """Draw a name that is not taken."""
    return str(rng.choice([name for name in names if name not in taken]))


def _retask(stated: Requirement) -> Requirement:
    """Correct the task after a change of the number of objects."""
    return parse(describe(stated))


def _alter(stated: Requirement, kind: str, rng: np.random.Generator) -> Requirement | None:
    """Change one thing so that the caption is false; None if this kind does not apply."""
    specs = list(stated.objects)
    i = int(rng.integers(len(specs)))
    spec = specs[i]
    change = dataclasses.replace
    if kind == "relation" and stated.relation:
        # The opposite is the hardest and comes half of the time.
        opposite = _OPPOSITE[stated.relation]
        other = opposite if rng.random() < 0.5 else _other(rng, RELATIONS, stated.relation)
        return change(stated, relation=other)
    if kind == "count" and len(specs) == 1:
        wrong = [n for n in (1, *NUMBERS) if n != stated.count and (n > 1 or rng.random() < 0.3)]
        return _retask(change(stated, count=int(rng.choice(wrong))))
    if kind == "extra" and len(specs) == 1 and stated.count == 1:
        added = ObjectSpec(
            _other(rng, SHAPES, spec.shape),
            _other(rng, COLORS, spec.color) if spec.color else None,
            _other(rng, SIZES) if spec.size else None,
        )
        return _retask(change(stated, objects=(spec, added)))
    if kind == "swap" and len(specs) == 2:
        a, b = specs
        if a.color != b.color:
            return change(stated, objects=(change(a, color=b.color), change(b, color=a.color)))
        if a.size != b.size:
            return change(stated, objects=(change(a, size=b.size), change(b, size=a.size)))
    if kind == "color" and spec.color:
        specs[i] = change(spec, color=_other(rng, COLORS, *(s.color for s in specs)))
        return change(stated, objects=tuple(specs))
    if kind == "shape":
        specs[i] = change(spec, shape=_other(rng, SHAPES, *(s.shape for s in specs)))
        return change(stated, objects=tuple(specs))
    if kind == "size" and spec.size:
        specs[i] = change(spec, size=_other(rng, SIZES, spec.size))
        return change(stated, objects=tuple(specs))
    if kind == "background" and stated.background:
        return change(stated, background=_other(rng, BACKGROUNDS, stated.background))
    return None


# Drawn more often the harder they are to tell from the truth.
_NEGATIVE_KINDS = {
    "relation": 3.0,
    "swap": 3.0,
    "count": 3.0,
    "color": 1.5,
    "shape": 1.5,
    "size": 1.0,
    "background": 0.5,
    "extra": 0.5,
}


def hard_negatives(
    scenes: Scenes, rng: np.random.Generator, k: int, *, split: Split = "all"
) -> list[list[str]]:
    """Write captions that are false for the scene by one change (or more, if there are too few).

    The changes: relation replaced, attributes swapped between the objects, count, color, shape,
    size or background replaced, an object added.

    Args:
        scenes: `n` scenes.
        rng: Source of randomness.
        k: Captions a scene, all different.
        split: Only captions of this split; `"train"` keeps held-out captions out of training.

    Returns:
        `n` lists of `k` captions.

    Raises:
        UsageError: if a caption does not have that many.
    """
    kinds, weights = list(_NEGATIVE_KINDS), np.array(list(_NEGATIVE_KINDS.values()))
    cumulative = np.cumsum(weights / weights.sum())
    result = []
    for truth in requirements(scenes):
        found: dict[str, None] = {}
        altered: Requirement | None = None
        for attempt in range(60 * k):
            if len(found) == k:
                break
            # Few captions ("two stars") have too few single changes; then the changes add up.
            start = altered if altered is not None and attempt >= 30 * k else truth
            kind = kinds[min(int(np.searchsorted(cumulative, rng.random())), len(kinds) - 1)]
            altered = _alter(start, kind, rng)
            if altered is None or altered in (truth, reverse(truth)):
                continue
            if len(altered.objects) == 2 and rng.random() < 0.5:
                altered = reverse(altered)
            if split == "all" or split_of(altered) == split:
                found[describe(altered)] = None
        if len(found) < k:
            raise UsageError(
                f"asked for k={k} different false captions of {describe(truth)!r}, "
                f"found {len(found)}; ask for fewer"
            )
        result.append(list(found))
    return result
