"""Frozen dataclasses whose fields are checked against their annotations, by name."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusion_grpo.errors import UsageError, suggest


@dataclasses.dataclass(frozen=True)
class Section:
    """One named section of a configuration.

    Construction converts an integer to the float and a list to the tuple that a field is
    annotated with, and refuses any other mismatch.

    Raises:
        UsageError: a field has the wrong type, or a number is infinite or NaN.
    """

    section_name: ClassVar[str]

    def __post_init__(self) -> None:
        """Convert and check every field against its annotation."""
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = self._converted(field.name, getattr(self, field.name), hints[field.name])
            object.__setattr__(self, field.name, value)

    def require(self, ok: bool, field: str, expected: str) -> None:
        """Raise a `UsageError` that names the field and its value unless `ok`."""
        if not ok:
            raise UsageError(f"{self._key(field)} is {getattr(self, field)!r}; expected {expected}")

    def require_positive(self, *names: str) -> None:
        """Raise a `UsageError` for the first of the named fields that is not above 0."""
        for name in names:
            value = getattr(self, name)
            least = "1 or more" if isinstance(value, int) else "a number above 0"
            self.require(value is None or value > 0, name, least)

    def require_non_negative(self, *names: str) -> None:
        """Raise a `UsageError` for the first of the named fields that is below 0."""
        for name in names:
            self.require(getattr(self, name) >= 0, name, "0 or more")

    def chosen(self, field: str) -> Any:
        """Return a field that a run may leave open until its devices are known.

        Raises:
            UsageError: it is open still.
        """
        value = getattr(self, field)
        self.require(value is not None, field, "a value, which `fitting.fitted` chooses")
        return value

    @classmethod
    def _key(cls, field: str) -> str:
        return f"{cls.section_name}.{field}"

    @classmethod
    def _converted(cls, field: str, value: Any, hint: Any) -> Any:
        try:
            return _conform(value, hint)
        except TypeError as error:
            raise UsageError(f"{cls._key(field)} is {value!r}; expected {error}") from None


SectionT = TypeVar("SectionT", bound=Section)


def update_section(base: SectionT, values: Mapping[Any, Any], *, source: str) -> SectionT:
    """Return a section with some fields replaced by values read from a file.

    Args:
        base: the section to start from.
        values: field names to values, as YAML gives them. Text that is a number is accepted for
            a float, since YAML reads `1e-4` as text.
        source: what the values were read from, for the messages.

    Returns:
        The new section, checked as on construction.

    Raises:
        UsageError: an unknown field, named with the nearest one; a value of the wrong type.
    """
    hints = get_type_hints(type(base))
    names = [field.name for field in dataclasses.fields(base)]
    for key in values:
        if key not in names:
            raise UsageError(
                f"{source}: unknown field '{base._key(str(key))}'{suggest(str(key), names)}; "
                f"{base.section_name} has {', '.join(names)}"
            )
    try:
        read = {
            key: base._converted(key, _number_from_text(value, hints[key]), hints[key])
            for key, value in values.items()
        }
        return dataclasses.replace(base, **read)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def _number_from_text(value: Any, hint: Any) -> Any:
    """Return the number that text stands for where a float is wanted, else the value as it is."""
    if isinstance(value, str) and (hint is float or float in get_args(hint)):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _conform(value: Any, hint: Any) -> Any:
    """Return `value` as `hint` wants it; a TypeError's message says what was expected."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # in a configuration always `X | None`
        if value is None:
            return None
        (inner,) = (option for option in options if option is not type(None))
        return _conform(value, inner)
    if origin is Literal:
        if value not in options:
            near = suggest(value, options) if isinstance(value, str) else ""
            raise TypeError(f"one of {', '.join(map(repr, options))}{near}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError("a list")
        return tuple(_conform(item, options[0]) for item in value)
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError("a number")
        if not math.isfinite(value):
            raise TypeError("a finite number")
        return float(value)
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError("a whole number")
    if hint is bool and not isinstance(value, bool):
        raise TypeError("true or false")
    if hint is str and not isinstance(value, str):
        raise TypeError("text")
    return value
