"""What the user wrote about rewards: `clip=0.5`, `clip.model=shapes-clip`, and what it means."""

from __future__ import annotations

import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union
from urllib.parse import urlsplit

from diffusion_grpo.errors import UsageError, suggest

# Where the token of reward servers is taken from.
TOKEN_VARIABLE = "REWARD_SERVER_TOKEN"

_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class RewardSpec:
    """A reward as the user asked for it.

    Attributes:
        spec: where it is found, e.g. `clip`, `my_file.py:sharpness`.
        name: its short name, by which options refer to it: `clip`, `sharpness`.
        weight: its factor in the total; finite and not zero, negative to minimize.
        options: option name to the text given.
    """

    spec: str
    name: str
    weight: float = 1.0
    options: dict[str, str] = field(default_factory=dict)


def parse_reward_specs(rewards: Sequence[str], options: Sequence[str] = ()) -> list[RewardSpec]:
    """Parse `REWARD[=WEIGHT]` and `REWARD.OPTION=VALUE`.

    Args:
        rewards: for example `("clip=1.0", "my_file.py:sharpness=0.5")`; the weight defaults to 1.
        options: for example `("clip.model=shapes-clip",)`.

    Returns:
        One specification a reward, in the order given. Nothing is loaded yet.

    Raises:
        UsageError: no reward; a weight that is zero or not a finite number; a reward named twice;
            an option that is malformed, given twice, or for a reward that is not used.
    """
    if not rewards:
        raise UsageError("no reward given: name at least one, for example --reward clip=1.0")
    parsed: dict[str, RewardSpec] = {}
    for text in rewards:
        spec, weight = split_weight(text)
        name = short_name(spec)
        if name in parsed:
            raise UsageError(
                f"reward {name!r} is given twice ({parsed[name].spec!r} and {spec!r}): "
                "name each reward once, and give it the sum of the weights"
            )
        parsed[name] = RewardSpec(spec=spec, name=name, weight=weight)
    for text in options:
        key, equals, value = text.partition("=")
        name, dot, option = key.strip().rpartition(".")
        if not (equals and dot and name and option.isidentifier()):
            raise UsageError(
                f"reward option {text!r} is not of the form REWARD.OPTION=VALUE, "
                "for example clip.model=shapes-clip"
            )
        if name not in parsed:
            raise UsageError(
                f"reward option {text!r} is for the reward {name!r}, which is not used"
                f"{suggest(name, list(parsed))}; rewards in use: {', '.join(parsed)}"
            )
        if option in parsed[name].options:
            raise UsageError(f"reward option {name}.{option} is given twice: give it once")
        parsed[name].options[option] = value.strip()
    return list(parsed.values())


def split_weight(text: str) -> tuple[str, float]:
    """Split `REWARD[=WEIGHT]` into the reward and its weight, 1 where none is given.

    Raises:
        UsageError: no name, or a weight that is not a finite number other than zero.
    """
    # The last "=": a path may hold others.
    spec, equals, number = text.rpartition("=")
    if not equals:
        spec, number = text, "1"
    spec = spec.strip()
    if not spec:
        raise UsageError(
            f"reward {text!r} has no name: expected REWARD=WEIGHT, for example clip=1.0"
        )
    try:
        weight = float(number)
    except ValueError:
        raise UsageError(
            f"weight {number!r} of reward {text!r} is not a number: "
            "expected REWARD=WEIGHT, for example clip=1.0"
        ) from None
    if not math.isfinite(weight):
        raise UsageError(
            f"weight {number!r} of reward {spec!r} is not finite: expected a number such as 1.0"
        )
    if weight == 0:
        raise UsageError(
            f"weight of reward {spec!r} is zero, so it would be computed for "
            "nothing: leave the reward out"
        )
    return spec, weight


def split_spec(spec: str) -> tuple[Literal["file", "module", "name", "server"], str, str]:
    """Split a specification into its kind and its place.

    Args:
        spec: a reward without its weight.

    Returns:
        The kind; the path, module, name or URL; and the name of the object in it, or `""`.

    Raises:
        UsageError: it has none of the forms.
    """
    if re.match(r"https?://", spec):
        return "server", spec, server_name(spec)
    file = re.fullmatch(r"(.*\.py)(?::([^:/\\]*))?", spec)
    if file:
        if file[2] == "":
            raise UsageError(
                f"reward {spec!r} names no function after the colon: expected my_file.py:function"
            )
        return "file", file[1], file[2] or ""
    place, colon, name = spec.partition(":")
    if colon:
        if not (
            name and all(part.isidentifier() for part in (*place.split("."), *name.split(".")))
        ):
            raise UsageError(
                f"reward {spec!r} is not of the form package.module:function or my_file.py:function"
            )
        return "module", place, name
    return "name", spec, ""


def names_of_same(rewards: Sequence[str], others: Sequence[str]) -> set[str]:
    """Return the short names of the rewards that are found where one of the others is.

    `my/clip.py` is another reward than the built-in `clip`, though its name is the same.

    Args:
        rewards: `REWARD[=WEIGHT]` each.
        others: likewise.
    """

    def place(spec: str) -> tuple[str, ...]:
        kind, path, name = split_spec(spec)
        path = os.path.abspath(os.path.expanduser(path)) if kind == "file" else path
        return kind, path, name

    known = {place(split_weight(text)[0]) for text in others}
    specs = [split_weight(text)[0] for text in rewards]
    return {short_name(spec) for spec in specs if place(spec) in known}


def short_name(spec: str) -> str:
    """Return the name by which options and metrics refer to a reward: `a/b.py:c` is `c`."""
    kind, place, name = split_spec(spec)
    return name or (Path(place).stem if kind == "file" else place)


def split_servers(spec: str) -> list[str]:
    """Split `http://a:8000,http://b:8000` into URLs without a slash at their end.

    Raises:
        UsageError: one is not a URL of a server.
    """
    servers = [url.strip().rstrip("/") for url in spec.split(",")]
    for url in servers:
        try:
            parts = urlsplit(url)
            sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            parts, sound = urlsplit(""), False
        if not sound or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
            raise UsageError(
                f"reward {spec!r}: {url!r} is not a server's URL; expected http://host:port, or "
                "several with commas between them"
            )
        if parts.username is not None:
            raise UsageError(
                f"reward server {parts.hostname!r}: a URL with a password would be written into "
                f"the run's config; set {TOKEN_VARIABLE} in the environment instead"
            )
    return servers


def server_name(spec: str) -> str:
    """Return the name by which options refer to a server: its last path component, or its host."""
    parts = urlsplit(split_servers(spec)[0])
    return parts.path.rpartition("/")[2] or parts.netloc


def bind_options(
    spec: str, factory: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Check options against a factory's parameters and convert text by their annotations.

    Args:
        spec: what the user called the reward, for messages.
        factory: its parameters are the options; a parameter without a default must be given.
        options: option name to value: text, or a value of the right type already.

    Returns:
        Option name to converted value, only those given.

    Raises:
        UsageError: an unknown or missing option, or a value that the annotation does not admit.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    for name in options:
        if name not in parameters:
            raise UsageError(
                f"reward {spec!r} has no option {name!r}{suggest(name, parameters)}; "
                f"its options: {', '.join(map(str, parameters.values())) or 'none'}"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in options:
            raise UsageError(f"reward {spec!r} needs the option {name!r}, which was not given")
    if not options:
        return {}
    try:
        # The annotations of a class marked as a factory are those of its __init__.
        annotated = factory.__init__ if isinstance(factory, type) else factory
        annotations = typing.get_type_hints(annotated)
    except NameError as error:
        raise UsageError(
            f"reward {spec!r}: an annotation of its factory cannot be resolved: {error}"
        ) from error
    return {
        name: convert_option(
            f"option {name!r} of reward {spec!r}",
            value,
            annotations.get(name, _type_of_default(parameters[name].default)),
        )
        for name, value in options.items()
    }


def _type_of_default(default: Any) -> Any:
    return type(default) if isinstance(default, bool | int | float | str) else Any


def convert_option(what: str, value: Any, annotation: Any) -> Any:
    """Convert an option's value to the type that an annotation asks for.

    Args:
        what: the option, for messages.
        value: text, or a value of the right type already.
        annotation: `int`, `float`, `bool`, `str`, `Path`, `Literal[...]`, a union of these (with
            `None`, spelled `none`), or `Any`, which admits every value as it is.

    Returns:
        The value, converted.

    Raises:
        UsageError: the value is not of that type, or the annotation is of another kind.
    """
    if annotation is Any or annotation is object:
        return value
    origin = typing.get_origin(annotation)
    if origin is Literal:
        choices = typing.get_args(annotation)
        for choice in choices:
            if value == choice or (isinstance(value, str) and value == str(choice)):
                return choice
        names = [str(choice) for choice in choices]
        raise UsageError(
            f"{what} is {value!r}{suggest(str(value), names)}; expected one of: {', '.join(names)}"
        )
    if origin in (Union, types.UnionType):
        return _convert_union(what, value, typing.get_args(annotation))
    if annotation is bool:
        lowered = str(value).lower()
        if isinstance(value, bool | str) and lowered in (*_TRUE, *_FALSE):
            return lowered in _TRUE
        raise UsageError(f"{what} is {value!r}; expected true or false")
    if annotation is int or annotation is float:
        return _convert_number(what, value, annotation)
    if annotation is str or annotation is Path:
        if isinstance(value, str | Path):
            return annotation(value)
        raise UsageError(f"{what} is {value!r}; expected text")
    raise UsageError(
        f"{what} is annotated {annotation!r}, which cannot be given as an option; "
        "use int, float, bool, str, Path, Literal, or one of these or None"
    )


def _convert_number(what: str, value: Any, kind: type) -> Any:
    wanted = "a whole number" if kind is int else "a number"
    admitted = (str, int) if kind is int else (str, int, float)
    if isinstance(value, admitted) and not isinstance(value, bool):
        try:
            return kind(value)
        except ValueError:
            pass
    raise UsageError(f"{what} is {value!r}; expected {wanted}")


def _convert_union(what: str, value: Any, members: tuple[Any, ...]) -> Any:
    if types.NoneType in members and (value is None or str(value).lower() == "none"):
        return None
    # Text last: it admits everything.
    others = sorted((m for m in members if m is not types.NoneType), key=lambda m: m is str)
    failures = []
    for member in others:
        try:
            return convert_option(what, value, member)
        except UsageError as failure:
            failures.append(failure)
    if types.NoneType in members:
        raise UsageError(f"{failures[-1]}, or none")
    raise failures[-1]
