"""Safetensors files, read and written one tensor at a time.

A component of a pipeline is one file, or shards under an index, named as Diffusers and Transformers
name them. What is read or written passes through memory tensor by tensor: loading never holds two
copies of a model, nor does saving. Nothing here can execute what it reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusion_grpo.errors import UsageError

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"
MAX_SHARD_BYTES = 5 * 10**9

_VARIANT_FILE = re.compile(
    rf"(?:{DIFFUSERS_STEM}|{TRANSFORMERS_STEM})\.(.+?)(?:-\d{{5}}-of-\d{{5}})?\.safetensors$"
)

_CODES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Entry(NamedTuple):
    """A tensor that is read when it is wanted.

    Attributes:
        shape: of the tensor.
        dtype: NumPy dtype (bfloat16 by ml_dtypes).
        read: returns it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read anew whenever it is asked for.

    Attributes:
        entries: name → `Entry`, in the order they are best read in.
    """

    def __init__(self, entries: Mapping[str, Entry]):
        """Wrap entries."""
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """Read a tensor."""
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.entries)

    def cast(self, dtype: Any | None) -> Tensors:
        """Return the same tensors, those of floating point in another dtype (None: as they are)."""
        if dtype is None:
            return self
        new = np.dtype(dtype)

        def converted(entry: Entry) -> Entry:
            if entry.dtype == new or not _is_floating(entry.dtype):
                return entry
            return Entry(entry.shape, new, lambda: entry.read().astype(new))

        return Tensors({name: converted(entry) for name, entry in self.entries.items()})


def _is_floating(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def read_safetensors(directory: Path, *, variant: str | None = None) -> Tensors:
    """Open a component's weights: one safetensors file, or the shards its index names.

    Args:
        directory: the component's.
        variant: of the files' names, such as `fp16` in `model.fp16.safetensors`.

    Raises:
        UsageError: there is no such file (pickled weights are never read), or it cannot be parsed.
    """
    files, origin = _weight_files(directory, variant)
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file} is named by {origin} but does not exist; copy it too")
        entries |= open_file(file).entries
    return Tensors(entries)


def open_file(file: Path) -> Tensors:
    """Open one safetensors file.

    Raises:
        UsageError: it is not one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):  # checks the header against the file's size
            pass
    except SafetensorError as error:
        raise UsageError(
            f"{file} is not a readable safetensors file: {error}; copy it again"
        ) from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    entries: dict[str, Entry] = {}
    for name, fields in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if fields["dtype"] not in _CODES:
            raise UsageError(
                f"{file}: tensor {name!r} is {fields['dtype']}, which is not supported; expected "
                f"one of {', '.join(_CODES)}"
            )
        dtype, shape = np.dtype(_CODES[fields["dtype"]]), tuple(fields["shape"])
        offset = 8 + length + fields["data_offsets"][0]
        entries[name] = Entry(shape, dtype, _reader(file, dtype, shape, offset))
    return Tensors(entries)


def _reader(
    file: Path, dtype: np.dtype, shape: tuple[int, ...], offset: int
) -> Callable[[], np.ndarray]:
    """Return what reads a tensor by a plain read: pages of a memory map would count as ours."""

    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        return np.fromfile(file, dtype, count, offset=offset).reshape(shape)

    return read


def has_variant(directory: Path, variant: str) -> bool:
    """Whether a component has safetensors of a variant."""
    return any((directory / name).is_file() for name in _weight_names(variant))


def variants_of(directory: Path) -> list[str]:
    """Return the variants that a component has safetensors of, sorted."""
    found = (_VARIANT_FILE.match(path.name) for path in directory.glob("*.safetensors"))
    return sorted({match[1] for match in found if match})


def _weight_names(variant: str | None) -> list[str]:
    """Return how a component's weights may be named: indexes of shards, and single files."""
    infix = f".{variant}" if variant else ""
    names = []
    for stem in (DIFFUSERS_STEM, TRANSFORMERS_STEM):
        names.append(f"{stem}{infix}.safetensors.index.json")
        if variant:
            names.append(f"{stem}.safetensors.index.{variant}.json")
        names.append(f"{stem}{infix}.safetensors")
    return names


def _weight_files(directory: Path, variant: str | None) -> tuple[list[Path], str]:
    """Return a component's weight files, and the name of the index that lists them."""
    names = _weight_names(variant)
    for name in names:
        if not (directory / name).is_file():
            continue
        if name.endswith(".safetensors"):
            return [directory / name], ""
        listed = _weight_map(directory / name).values()
        return sorted({directory / Path(shard).name for shard in listed}), name
    files = [name for name in names if name.endswith(".safetensors")]
    raise UsageError(_no_weights(directory, files, variant))


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        raise UsageError(
            f"{index} is not an index of safetensors shards; expected JSON with a weight_map"
        ) from None


def _no_weights(directory: Path, names: list[str], variant: str | None) -> str:
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if present:
        hint = ""
        if not variant and (variants := variants_of(directory)):
            hint = (
                f": a pipeline is read in a variant with --variant {variants[0]} (`train`: "
                f"--model.variant {variants[0]})"
            )
        return f"{directory} holds {', '.join(present)}, expected {' or '.join(names)}{hint}"
    pickles = (".bin", ".pt", ".pth", ".ckpt")
    if pickled := sorted(p.name for p in directory.glob("*") if p.suffix in pickles):
        return (
            f"{directory} holds pickled weights ({', '.join(pickled)}) but no .safetensors file. "
            "Pickles can execute code, so they are never loaded; convert them with "
            "`pipe.save_pretrained(dir, safe_serialization=True)` in Diffusers"
        )
    return f"{directory} holds no .safetensors file; expected one of {', '.join(names)}"


def write_safetensors(
    tensors: Mapping[str, np.ndarray],
    directory: Path,
    *,
    stem: str = DIFFUSERS_STEM,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write a component's weights: one file, or above a size shards and their index.

    Args:
        tensors: by name; `Tensors` are read one at a time.
        directory: where; made if absent.
        stem: `diffusion_pytorch_model` for Diffusers' classes, `model` for Transformers'.
        max_shard_bytes: the most that one file holds; a single larger tensor has its own.

    Returns:
        The weight files, in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for stale in (*directory.glob(f"{stem}*.safetensors"), *directory.glob(f"{stem}*.index.json")):
        stale.unlink()
    entries = as_entries(tensors)
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.nbytes
    count = len(shards)
    if count == 1:
        files = [directory / f"{stem}.safetensors"]
    else:
        files = [
            directory / f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
        ]
        places = {
            name: file.name for file, part in zip(files, shards, strict=True) for name in part
        }
        total = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (directory / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n"
        )
    for file, part in zip(files, shards, strict=True):
        write_file(part, file)
    return files


def as_entries(tensors: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Return tensors as entries; arrays in memory are entries that return themselves."""
    if isinstance(tensors, Tensors):
        return tensors.entries
    return {
        name: Entry(array.shape, array.dtype, lambda array=array: array)
        for name, array in tensors.items()
    }


def write_file(entries: Mapping[str, Entry], file: Path) -> None:
    """Write one safetensors file, holding one tensor at a time.

    The format: the header's length as a little-endian 64-bit number, the header (JSON, padded with
    spaces to a multiple of 8), the tensors' bytes.

    Args:
        entries: name → entry.
        file: where.

    Raises:
        OSError: it cannot be written; the error says why, and names it.
    """
    codes = {np.dtype(dtype): code for code, dtype in _CODES.items()}
    # Every tensor must start at a multiple of its item size; else by name, as the library has it.
    ordered = dict(sorted(entries.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # as Transformers demands
    offset = 0
    for name, entry in ordered.items():
        span = [offset, offset + entry.nbytes]
        header[name] = {
            "dtype": codes[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for entry in ordered.values():  # an error of `tofile` would not say why
                stream.write(np.ascontiguousarray(entry.read()).reshape(-1).view(np.uint8).data)
    except OSError as error:
        error.filename = str(file)
        raise
