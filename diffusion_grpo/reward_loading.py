"""How a reward is found and built: built-in names, files, modules, entry points, servers."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.resources import resource_path
from diffusion_grpo.reward_specs import bind_options, short_name, split_spec

ENTRY_POINT_GROUP = "diffusion_grpo.rewards"

_SIGNATURE = "(images, prompts, metadata)"
_module_numbers = itertools.count()
_neighbor_folders: dict[str, Path] = {}  # module beside a reward's file → that file's folder


@dataclass(frozen=True)
class LoadedReward:
    """A reward ready to be called.

    Attributes:
        name: its name in the metrics.
        function: called as `function(images, prompts, metadata)`.
        on_device: whether it takes float32 device arrays in [0, 1] rather than uint8 host arrays.
        batch_size: the most images it is given at once; None for no limit.
        of_group: whether it compares the images of one prompt: it is given one group at a time.
        spec: the specification it was loaded by.
        options: the options it was built with, converted.
    """

    name: str
    function: Callable[..., Any]
    on_device: bool = False
    batch_size: int | None = None
    of_group: bool = False
    spec: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def list_rewards() -> dict[str, str]:
    """Names and first docstring lines of the built-in rewards, without executing them.

    Returns:
        Name to first line of the file's docstring, in alphabetical order.
    """
    found = {}
    for path in sorted(resource_path("rewards").glob("*.py")):
        if not path.name.startswith("_"):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = doc.partition("\n")[0]
    return found


def load_reward(spec: str, options: Mapping[str, Any] | None = None) -> LoadedReward:
    """Find a reward, import it and build it with its options.

    The folder of a file is on the path while the file is imported, last: modules that lie beside it
    are found by the imports at its top, but not by one that is executed later, in a function, which
    finds only what was imported before.

    Args:
        spec: a built-in name, `my_file.py`, `my_file.py:name`, `package.module:function`, an
            installed entry point of the group `diffusion_grpo.rewards`, or the URL of a reward
            server, or several with commas between them. A built-in name goes before an entry
            point.
        options: option name to value; text is converted by the annotation of the factory's
            parameter.

    Returns:
        The reward.

    Raises:
        UsageError: the reward does not exist, cannot be imported, is not a reward, or does not take
            these options. The message names the file and the line where the fault is in the
            reward's own code.
    """
    options = dict(options or {})
    kind, place, name = split_spec(spec)
    if kind == "file":
        target = _from_file(spec, Path(place).expanduser(), name)
    elif kind == "module":
        target = _from_module(spec, place, name)
    elif kind == "server":
        from diffusion_grpo.reward_client import server_reward

        target = server_reward(place)
    else:
        target = _from_name(spec)
    converted: dict[str, Any] = {}
    if getattr(target, "is_reward_factory", False):
        converted = bind_options(spec, target, options)
        with _reporting(spec, "could not be built", source_file(target)):
            target = target(**converted)
    elif options:
        raise UsageError(
            f"reward {spec!r} takes no options, but {', '.join(options)} was given: options are "
            "the parameters of a function marked with @diffusion_grpo.reward.reward_factory"
        )
    return wrap_reward(target, name=short_name(spec), spec=spec, options=converted)


def wrap_reward(
    function: Any,
    *,
    name: str,
    spec: str = "",
    options: Mapping[str, Any] | None = None,
) -> LoadedReward:
    """Check that a callable is a reward, and read the attributes it declares.

    Args:
        function: the reward itself, not a factory.
        name: its name in the metrics, unless it has an attribute `name`.
        spec: what the user called it, for messages.
        options: the options it was built with.

    Returns:
        The reward.

    Raises:
        UsageError: not a callable of `(images, prompts, metadata)`, or a bad attribute.
    """
    spec = spec or name
    hint = "if it builds a reward, mark it with @diffusion_grpo.reward.reward_factory"
    if isinstance(function, type) or getattr(function, "is_reward_factory", False):
        raise UsageError(
            f"reward {spec!r} is a class or a factory, expected a callable of {_SIGNATURE}: {hint}"
        )
    if not callable(function):
        raise UsageError(
            f"reward {spec!r} is {type(function).__name__} {function!r}, "
            f"expected a callable of {_SIGNATURE}"
        )
    try:
        signature = inspect.signature(function)
    except ValueError:  # some callables written in C have none
        signature = None
    if signature is not None:
        try:
            signature.bind(None, None, None)
        except TypeError:
            raise UsageError(
                f"reward {spec!r} takes {signature}, but a reward is called with "
                f"{_SIGNATURE}: {hint}"
            ) from None
    name = getattr(function, "name", name)
    if not isinstance(name, str) or not re.fullmatch(r"[^\s/=]+", name):
        raise UsageError(
            f"reward {spec!r} has the name {name!r}: expected a word without spaces, '/' or '='"
        )
    batch_size = getattr(function, "batch_size", None)
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise UsageError(
            f"reward {spec!r} has batch_size {batch_size!r}: expected a whole number of at least 1"
        )
    marks = [getattr(function, mark, False) for mark in ("on_device", "of_group")]
    for mark, value in zip(("on_device", "of_group"), marks, strict=True):
        if not isinstance(value, bool):
            raise UsageError(f"reward {spec!r} has {mark} {value!r}: expected True or False")
    check = getattr(function, "check", None)
    if check is not None and not callable(check):
        raise UsageError(f"reward {spec!r} has check {check!r}: expected a function of prompts")
    device, group = marks
    return LoadedReward(name, function, device, batch_size, group, spec, dict(options or {}))


def _from_name(spec: str) -> Any:
    built_in = list_rewards()
    if spec in built_in:
        return _from_file(spec, resource_path("rewards", f"{spec}.py"), "")
    installed = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    matches = {point.value: point for point in installed if point.name == spec}
    if len(matches) > 1:
        raise UsageError(
            f"reward {spec!r} is offered by several installed packages "
            f"({', '.join(sorted(matches))}): name one of them as package.module:function"
        )
    for point in matches.values():
        with _reporting(spec, "could not be imported"):
            return point.load()
    extra = sorted(set(installed.names) - set(built_in))
    file = Path(f"{spec}.py")
    mend = f"; for the file {str(file)!r}, give its name with .py" if file.is_file() else ""
    raise UsageError(
        f"unknown reward {spec!r}{suggest(spec, [*built_in, *extra])}{mend}; "
        f"built in: {', '.join(built_in)}"
        + (f"; installed: {', '.join(extra)}" if extra else "")
        + "; or name a file (my_file.py:function), a package.module:function or a server's URL"
    )


def _from_module(spec: str, place: str, name: str) -> Any:
    # A console script does not have the working directory on its path, but users expect their
    # package there to be found.
    with _last_on_path(Path.cwd()), _reporting(spec, "could not be imported"):
        module = importlib.import_module(place)
    return _lookup(spec, module, name)


@contextmanager
def _last_on_path(folder: Path) -> Iterator[None]:
    """Let modules in a folder be imported.

    Last, and only during the import, so that no folder of a user's shadows a package.
    """
    here = str(folder)
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]


@contextmanager
def _neighbors(spec: str, folder: Path) -> Iterator[None]:
    """Let a reward's file import modules that lie beside it, and none that lies beside another's.

    Raises:
        UsageError: it imported one with a name that a neighbor of another folder's reward has:
            there is one module of a name.
    """
    if folder in {Path(place).absolute() for place in sys.path}:  # they are modules like all others
        yield
        return
    foreign = {name: where for name, where in _neighbor_folders.items() if where != folder}
    hidden = {name: sys.modules.pop(name) for name in foreign if name in sys.modules}
    before, own = set(sys.modules), set[str]()
    try:
        with _last_on_path(folder):
            yield
    finally:
        new = {name: module for name, module in sys.modules.items() if name not in before}
        sys.modules.update(hidden)
        own = {name for name in new if "." not in name and _lies_in(new[name], folder)}
        found = {name for name in new if name.partition(".")[0] in own} - hidden.keys()
        _neighbor_folders.update(dict.fromkeys(found, folder))
    twice = sorted(own & hidden.keys())
    if twice:
        raise UsageError(
            f"reward {spec!r} imports {twice[0]!r} from {str(folder)!r}, but another reward has "
            f"imported a module of this name from {str(foreign[twice[0]])!r}; give one of them "
            "another name"
        )


def _lies_in(module: types.ModuleType, folder: Path) -> bool:
    spec = getattr(module, "__spec__", None)
    places = (spec.submodule_search_locations or [spec.origin]) if spec is not None else []
    return any(Path(place).parent == folder for place in places if place is not None)


def _from_file(spec: str, path: Path, name: str) -> Any:
    if not path.is_file():
        raise UsageError(
            f"reward {spec!r}: there is no file {str(path)!r} (in {str(Path.cwd())!r})"
        )
    # A private, unique name: a user's rewards.py or clip.py never stands in for another module.
    module_name = f"_diffusion_grpo_reward_{next(_module_numbers)}_{path.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None and module_spec.loader is not None  # true of every *.py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        neighbors = _neighbors(spec, path.absolute().parent)
        with neighbors, _reporting(spec, "could not be imported", str(path)):
            module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    stem = path.stem.replace("-", "_")
    if name or callable(getattr(module, stem, None)):
        return _lookup(spec, module, name or stem)
    choices = _public_functions(module)
    if len(choices) == 1:
        return getattr(module, choices[0])
    if not choices:
        raise UsageError(
            f"reward {spec!r}: the file {str(path)!r} defines no public function: "
            f"write one of {_SIGNATURE}"
        )
    raise UsageError(
        f"reward {spec!r}: the file {str(path)!r} defines several functions and none "
        f"is named {stem!r}: say which, one of "
        + ", ".join(f"{path.name}:{choice}" for choice in choices)
    )


def _public_functions(module: types.ModuleType) -> list[str]:
    def defined_here(value: Any) -> bool:
        factory = getattr(value, "is_reward_factory", False)
        is_reward = callable(value) and (factory or not isinstance(value, type))
        return is_reward and getattr(value, "__module__", None) == module.__name__

    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and defined_here(value)
    ]


def _lookup(spec: str, module: types.ModuleType, name: str) -> Any:
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            choices = _public_functions(module)
            place = getattr(module, "__file__", None) or f"the module {module.__name__!r}"
            raise UsageError(
                f"reward {spec!r}: {place} has no {name!r}{suggest(name, choices)}; "
                f"it defines: {', '.join(choices) or 'no public function'}"
            )
        target = getattr(target, part)
    return target


@contextmanager
def _reporting(spec: str, what: str, file: str | None = None) -> Iterator[None]:
    """Turn whatever a reward's own code raises while it is loaded into a message with its place."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"reward {spec!r} {what}: {describe_error(error, file)}") from error


def source_file(function: Any) -> str | None:
    """Return the file that a callable's module was loaded from, or None."""
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    return getattr(module, "__file__", None)


def describe_error(error: Exception, file: str | None = None) -> str:
    """Describe an exception raised by a reward's code, with its place.

    Args:
        error: the exception.
        file: the reward's own file: a line in it says more to the user than one in a library.

    Returns:
        `TypeError: message (my_file.py, line 7)`.
    """
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == file]
    foreign = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    if not (own or foreign):
        return text
    frame = (own or foreign)[-1]
    return f"{text} ({frame.filename}, line {frame.lineno})"
