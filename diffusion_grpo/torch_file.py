"""Read tensors from the `.pth` and `.pt` files of `torch.save`, without being able to run code.

Such a file is a zip archive: `data.pkl`, a pickle, says which tensors there are; `data/0`,
`data/1`, … hold their bytes. Unpickling calls whatever functions a pickle names. So nothing here
unpickles: `read_torch_file` interprets the few opcodes that plain data and tensors need, imports
nothing, calls nothing that a file names, and refuses every other opcode and name.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_grpo.errors import UsageError

_DTYPES: dict[str, Any] = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": ml_dtypes.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
}
_MAX_PICKLE_BYTES = 64 * 2**20  # data.pkl alone; the largest published model's is below 1 MiB


class _Name(NamedTuple):
    """A function or class that a pickle names: a text, never the thing itself."""

    text: str


class _Mark:
    """The begin of a tuple, list or dictionary on the stack."""


class _Storage(NamedTuple):
    """The elements of one or more tensors."""

    dtype: Any
    key: str
    count: int


def read_torch_file(path: str | Path) -> Any:
    """Read what `torch.save` wrote.

    Args:
        path: a file of PyTorch 1.6 (2020) or newer.

    Returns:
        Dictionaries, lists, tuples, numbers and texts as they were saved, tensors and parameters
        as NumPy arrays (bfloat16 as `ml_dtypes.bfloat16`).

    Raises:
        UsageError: no such file, another format, a damaged file, or one that holds anything but
            tensors and plain data, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{str(path)!r}: no such file; expected one written by torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(path, archive).read()
    except zipfile.BadZipFile as error:
        raise UsageError(
            f"{path} is not a readable zip archive ({error}): it is damaged, or was written by "
            "PyTorch before 1.6; download it anew, or load it there and save it as safetensors"
        ) from None


def tensors_of(saved: Any, *, source: str) -> dict[str, np.ndarray]:
    """Return the state dictionary of a checkpoint: itself, or what is under `state_dict`.

    Raises:
        UsageError: it is not a dictionary of tensors by name.
    """
    if isinstance(saved, Mapping) and isinstance(saved.get("state_dict"), Mapping):
        saved = saved["state_dict"]
    named = isinstance(saved, Mapping) and saved and all(isinstance(name, str) for name in saved)
    if not named or not all(isinstance(value, np.ndarray) for value in saved.values()):
        raise UsageError(f"{source} holds no dictionary of tensors by name")
    return dict(saved)


class _Reader:
    """One archive: a stack machine for its pickle, and its storages."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self.archive = path, archive
        self.files = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.files if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise UsageError(
                f"{path} is a zip archive without data.pkl; expected a file written by torch.save"
            )
        self.root = pickles[0].removesuffix("data.pkl")
        order = self.files.get(f"{self.root}byteorder")
        if order is not None and self._bytes(order.filename, 16).strip() != b"little":
            raise UsageError(f"{path} was written by a big-endian machine, which is not supported")
        self.storages: dict[str, np.ndarray] = {}

    def _bytes(self, name: str, limit: int) -> bytes:
        info = self.files.get(name)
        if info is None:
            raise self._damaged(f"{name} is missing")
        # torch stores without compression; what is compressed could expand without bounds.
        stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        if not stored or info.file_size > limit:
            raise self._damaged(f"{name} is compressed, encrypted or larger than {limit} bytes")
        return self.archive.read(info)

    def _damaged(self, what: str) -> UsageError:
        return UsageError(f"{self.path} cannot be read: {what}; is it a damaged download?")

    def _refused(self, what: str) -> UsageError:
        return UsageError(
            f"{self.path} holds {what}, which is neither a tensor nor plain data. Only those are "
            "read, since a pickle can run code: save the state_dict alone, or as safetensors"
        )

    def read(self) -> Any:
        code = self._bytes(f"{self.root}data.pkl", _MAX_PICKLE_BYTES)
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(code):
                if opcode.name == "STOP":
                    (result,) = stack
                    return result
                self._step(opcode.name, argument, stack, memo)
        except UsageError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise self._damaged(f"its data.pkl is malformed ({error})") from None
        raise self._damaged("its data.pkl ends too early")

    def _step(self, name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        """Do one instruction of the pickle."""
        if name in ("PROTO", "FRAME"):
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(_last(stack, count))]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if name == "SETITEM" else _since_mark(stack)
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = _pop(stack, 1) if name == "APPEND" else _since_mark(stack)
            _expect(stack[-1], list).extend(items)
        elif name == "GLOBAL":
            stack.append(_Name(argument))
        elif name == "STACK_GLOBAL":
            stack.append(_Name(" ".join(_pop(stack, 2))))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            function, arguments = _pop(stack, 2)
            stack.append(self._reduce(_expect(function, _Name).text, _expect(arguments, tuple)))
        elif name == "BUILD":
            # The attributes of a state dictionary (`_metadata`), which nobody here needs.
            _expect(stack[-2], dict)
            stack.pop()
        else:
            raise self._refused(f"the pickle opcode {name}")

    def _storage(self, identifier: Any) -> _Storage:
        kind, storage_type, key, _, count = _expect(identifier, tuple)
        storage = _expect(storage_type, _Name).text
        if kind != "storage" or storage not in _DTYPES:
            raise self._refused(f"a {storage}")
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"a storage of {count!r} elements")
        return _Storage(_DTYPES[storage], str(key), count)

    def _reduce(self, function: str, arguments: tuple[Any, ...]) -> Any:
        """Return what the named function would, of the three that build tensors."""
        if function == "collections OrderedDict" and not arguments:
            return {}
        if function == "torch._utils _rebuild_parameter":
            return _expect(arguments[0], np.ndarray)
        if function == "torch._utils _rebuild_tensor_v2":
            return self._tensor(*arguments[:4])
        raise self._refused(f"a {function.replace(' ', '.')}")

    def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any) -> np.ndarray:
        dtype, key, count = _expect(storage, _Storage)
        numbers = [offset, *_expect(shape, tuple), *_expect(strides, tuple)]
        if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"a tensor of shape {shape}, strides {strides}, offset {offset}")
        if key not in self.storages:
            size = np.dtype(dtype).itemsize
            data = self._bytes(f"{self.root}data/{key}", max(count * size, 1))
            if len(data) != count * size:
                raise self._damaged(f"storage {key} has {len(data)} bytes, not {count * size}")
            self.storages[key] = np.frombuffer(data, dtype)
        elements = self.storages[key]
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if math.prod(shape) and last >= count:
            raise ValueError(f"a tensor that reaches past the {count} elements of its storage")
        if math.prod(shape) > count:  # a view that repeats elements could be of any size
            raise ValueError(f"a tensor of shape {shape} in a storage of {count} elements")
        if not math.prod(shape):
            return np.zeros(shape, dtype)
        view = np.lib.stride_tricks.as_strided(
            elements[offset:], shape, [s * elements.itemsize for s in strides]
        )
        return np.array(view)


_CONSTANTS: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_LITERALS = frozenset(
    "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)


def _pop(stack: list[Any], count: int) -> list[Any]:
    items = _last(stack, count)
    del stack[-count:]
    return items


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("an instruction without its operands")
    return stack[-count:]


def _since_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while not isinstance(item := stack.pop(), _Mark):
        items.append(item)
    return items[::-1]


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value
