"""Templates with slots, `a {color} {animal}`: every combination is a prompt, made when asked for.

A template is text with slots in braces:

- `{animal}` is one of the words of a slot; `{a animal}` puts "a" or "an" before it;
- `{object#2}` is another word of the same slot, always different from `{object}`;
- `{object.plural}` is another field of the same word.

A file of templates is YAML::

    templates:
      - "a {color} {animal}"
      - text: "{number} {object.plural}"
        weight: 2
        metadata: {task: counting, objects: [{name: "{object}", count: "{number.count}"}]}
    slots:
      color: [red, green, blue]
      number: [{text: two, count: 2}, {text: three, count: 3}]

Slots that the file does not define are those of `prompts/slots/`. A metadata value that is one slot
and nothing else takes the word's own value, a number stays a number; any other text is filled in.
`weight` is how often the template is drawn relative to the other templates, whatever the number of
its combinations; without any, every combination is drawn as often as any other.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.prompt_types import LazyPrompts, Prompt, read_weight
from diffusion_grpo.resources import resource_path

Word = dict[str, Any]  # at least "text"

_SLOT = re.compile(r"\{(?P<article>a )?(?P<name>\w+)(?:#(?P<number>\d+))?(?:\.(?P<field>\w+))?\}")
_BRACE = re.compile(r"\{[^{}]*\}?|\}")
_MOST = 2**62  # combinations; Python's len() and NumPy's draws stop at 2⁶³


def is_template(text: str) -> bool:
    """Whether a text has a slot in it."""
    return bool(_SLOT.search(text))


def inline_template(text: str) -> TemplatePrompts:
    """Return the prompts of one template, with the slots that come with the project.

    Raises:
        UsageError: a slot that does not exist, or a brace that is no slot.
    """
    return TemplatePrompts([Template(text)], {}, where=f"template {text!r}")


def read_templates(text: str, *, where: str) -> TemplatePrompts:
    """Read a file of templates.

    Args:
        text: YAML.
        where: the file, for messages.

    Raises:
        UsageError: not YAML, or not templates and slots as the module's docstring has them.
    """
    values = _read_yaml(text, where)
    if not isinstance(values, dict) or not isinstance(values.get("templates"), list):
        raise UsageError(f"{where}: expected a mapping with a list of 'templates', and 'slots'")
    for key in values:
        if key not in ("templates", "slots"):
            raise UsageError(
                f"{where}: unknown key {key!r}{suggest(str(key), ('templates', 'slots'))}; "
                "expected templates, slots"
            )
    templates = [_read_template(t, f"{where}, template {i}") for i, t in _numbered(values)]
    if not templates:
        raise UsageError(f"{where}: no prompt in it; expected at least one template")
    slots = values.get("slots") or {}
    if not isinstance(slots, dict):
        raise UsageError(f"{where}: slots is {slots!r}; expected slot names with lists of words")
    own = {str(name): read_words(given, f"{where}, slot {name!r}") for name, given in slots.items()}
    return TemplatePrompts(templates, own, where=where)


@dataclass(frozen=True)
class Template:
    """A template: its text, what its prompts carry, and how often it is drawn."""

    text: str
    metadata: Any = None
    weight: float | None = None


class TemplatePrompts(LazyPrompts):
    """Every combination of the words of every template's slots; none is made before it is used.

    The combinations are numbered such that neighbors differ in most slots, so that the first few
    are a fair sample of all.
    """

    def __init__(
        self, templates: Sequence[Template], slots: Mapping[str, list[Word]], *, where: str
    ) -> None:
        """Count the combinations.

        Args:
            templates: at least one.
            slots: name → words; other names are looked for under `prompts/slots/`.
            where: what the templates were read from, for messages.

        Raises:
            UsageError: a slot that does not exist, or has fewer words than are asked for; a field
                that a word lacks; too many combinations.
        """
        self._templates = [_Expansion(t, slots, where) for t in templates]
        sizes = [t.count for t in self._templates]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._count = self._starts[-1]
        if self._count > _MOST:
            raise UsageError(f"{where}: {self._count} combinations; expected at most {_MOST}")
        given = [t.weight for t in templates]
        self.weighted = any(weight is not None for weight in given)
        even = [1.0 if weight is None else weight for weight in given]
        shares = np.array(even if self.weighted else sizes, np.float64)
        self._shares = shares / shares.sum()
        # A step near N / φ, without a common factor with N, visits every number once and spreads
        # neighbors (Knuth, The Art of Computer Programming 6.4: Fibonacci hashing).
        step = max(1, round(self._count * 0.6180339887498949))
        while math.gcd(step, self._count) > 1:
            step += 1
        self._step, self._back = step, pow(step, -1, self._count)

    def __len__(self) -> int:
        """Return the number of combinations of all templates."""
        return self._count

    def prompt_at(self, index: int) -> Prompt:
        """Make the prompt of one combination."""
        place = index * self._step % self._count
        number = bisect.bisect_right(self._starts, place) - 1
        template = self._templates[number]
        text, metadata = template(place - self._starts[number])
        weight = float(self._shares[number]) / template.count if self.weighted else 1.0
        return Prompt(text, metadata, weight)

    def source(self) -> str:
        """Return the templates, with the words of their slots."""
        return repr([template.source() for template in self._templates])

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        """Draw a template in proportion to its weight, then any of its combinations."""
        drawn = []
        for number in rng.choice(len(self._shares), count, p=self._shares).tolist():
            place = self._starts[number] + int(rng.integers(self._templates[number].count))
            drawn.append(place * self._back % self._count)
        return drawn


class _Expansion:
    """One template with the words of its slots; called with a number, it fills them in."""

    def __init__(self, template: Template, slots: Mapping[str, list[Word]], where: str) -> None:
        self._template = template
        found = list(_SLOT.finditer(template.text))
        for match in _BRACE.finditer(template.text):
            if not _SLOT.fullmatch(match[0]):
                raise UsageError(
                    f"{where}: {match[0]!r} in {template.text!r} is no slot; expected {{name}}, "
                    "{a name}, {name#2} or {name.field}"
                )
        # slot name → how many different words of it the template asks for
        self._slots: dict[str, int] = {}
        for match in found:
            number = int(match["number"] or 1)
            self._slots[match["name"]] = max(self._slots.get(match["name"], 0), number)
        self._words = {name: _words(name, slots, where) for name in self._slots}
        for name, asked in self._slots.items():
            if not 1 <= asked <= len(self._words[name]):
                raise UsageError(
                    f"{where}: {template.text!r} asks for {asked} different words of the slot "
                    f"{name!r}, which has {len(self._words[name])}"
                )
        for match in found:
            _check_field(match, self._words[match["name"]], where)
        _check_metadata(template.metadata, self._slots, self._words, where)
        sizes = (math.perm(len(self._words[name]), asked) for name, asked in self._slots.items())
        self.count = math.prod(sizes)

    def source(self) -> tuple[Template, dict[str, list[Word]]]:
        """Return the template and the words of its slots."""
        return self._template, self._words

    def __call__(self, number: int) -> tuple[str, dict[str, Any]]:
        chosen: dict[tuple[str, int], Word] = {}
        for name, asked in self._slots.items():
            left = list(self._words[name]) if asked > 1 else self._words[name]
            for place in range(1, asked + 1):
                number, index = divmod(number, len(left))
                chosen[name, place] = left[index]
                if asked > 1:
                    left = left[:index] + left[index + 1 :]

        def value(match: re.Match[str]) -> Any:
            return chosen[match["name"], int(match["number"] or 1)][match["field"] or "text"]

        def fill(match: re.Match[str]) -> str:
            word = str(value(match))
            if not match["article"]:
                return word
            known = chosen[match["name"], int(match["number"] or 1)].get("article")
            return f"{known or ('an' if word[:1].lower() in 'aeiou' else 'a')} {word}"

        def filled(node: Any) -> Any:
            if isinstance(node, dict):
                return {key: filled(item) for key, item in node.items()}
            if isinstance(node, list):
                return [filled(item) for item in node]
            if not isinstance(node, str):
                return node
            whole = _SLOT.fullmatch(node)
            return value(whole) if whole and not whole["article"] else _SLOT.sub(fill, node)

        return _SLOT.sub(fill, self._template.text), filled(self._template.metadata or {})


def _words(name: str, slots: Mapping[str, list[Word]], where: str) -> list[Word]:
    if name in slots:
        return slots[name]
    shipped = _shipped_slots()
    if name not in shipped:
        known = (*slots, *shipped)
        raise UsageError(
            f"{where}: no slot {name!r}{suggest(name, known)}; expected one of {', '.join(known)}"
        )
    return list(_shipped_words(shipped[name]))


def _shipped_slots() -> dict[str, Path]:
    return {path.stem: path for path in sorted(resource_path("prompts", "slots").glob("*.yaml"))}


@functools.cache
def _shipped_words(path: Path) -> tuple[Word, ...]:
    where = f"slot file {path}"
    return tuple(read_words(_read_yaml(path.read_text(encoding="utf-8"), where), where))


def read_words(given: Any, where: str) -> list[Word]:
    """Read the words of a slot: texts, or mappings with a `text` and other fields.

    Raises:
        UsageError: no list, an empty one, or a word without text.
    """
    if not isinstance(given, list) or not given:
        raise UsageError(f"{where}: {given!r}; expected a list of words")
    words = [word if isinstance(word, dict) else {"text": word} for word in given]
    for word in words:
        text = word.get("text")
        # YAML reads some words as numbers or booleans; a prompt needs the text that was written
        if not isinstance(text, str) or not text:
            raise UsageError(f"{where}: a word is {text!r}; expected text, in quotes if need be")
    return words


def _check_field(match: re.Match[str], words: list[Word], where: str) -> None:
    field = match["field"] or "text"
    lacking = [word["text"] for word in words if field not in word]
    if lacking:
        raise UsageError(
            f"{where}: {match[0]} asks for the field {field!r}, which the word {lacking[0]!r} lacks"
        )


def _check_metadata(
    node: Any, slots: Mapping[str, int], words: Mapping[str, list[Word]], where: str
) -> None:
    if isinstance(node, dict | list):
        for item in node.values() if isinstance(node, dict) else node:
            _check_metadata(item, slots, words, where)
    for match in _SLOT.finditer(node) if isinstance(node, str) else ():
        if int(match["number"] or 1) > slots.get(match["name"], 0):
            raise UsageError(f"{where}: the metadata has {match[0]}, which its text does not have")
        _check_field(match, words[match["name"]], where)


def _numbered(values: Mapping[str, Any]) -> list[tuple[int, Any]]:
    return list(enumerate(values["templates"], start=1))


def _read_template(given: Any, where: str) -> Template:
    values = {"text": given} if isinstance(given, str) else given
    known = ("text", "weight", "metadata")
    if not isinstance(values, dict) or set(values) - set(known):
        raise UsageError(f"{where}: {given!r}; expected text, or {', '.join(known)}")
    text, metadata = values.get("text"), values.get("metadata", {})
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: its text is {text!r}; expected text")
    if not isinstance(metadata, dict):
        raise UsageError(f"{where}: its metadata is {metadata!r}; expected a mapping")
    weight = read_weight(values["weight"], where=where) if "weight" in values else None
    return Template(text.strip(), metadata, weight)


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not valid YAML: {error}") from None
