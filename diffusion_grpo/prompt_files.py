"""Where prompts come from: text, JSON lines, CSV, Parquet, templates, and the lists by name."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.installing import install_command
from diffusion_grpo.prompt_templates import inline_template, is_template, read_templates
from diffusion_grpo.prompt_types import Prompt, read_weight
from diffusion_grpo.resources import resource_path

SUFFIXES = (".yaml", ".jsonl", ".txt", ".csv", ".parquet", ".yml")  # a name takes the first found
_EXPECTED = (
    "a .txt (a prompt a line), .jsonl (a JSON object a line), .csv, .parquet or .yaml (templates) "
    "file"
)


def load_prompts(source: str | Path) -> Sequence[Prompt]:
    """Load a prompt list.

    - `.txt`: one prompt a line; blank lines and lines that begin with `#` are left out.
    - `.jsonl`: one object a line, with the text under `"prompt"`.
    - `.csv`: a header line with a column `prompt`; the other columns are text. A first column
      without a name, such as the row numbers that pandas writes, is left out.
    - `.parquet`: a column `prompt`; needs the extra `parquet`.
    - `.yaml`: templates with slots, expanded when a prompt is asked for (`prompt_templates.py`).

    What stands beside the text is metadata for the rewards, but for `weight`: how often the prompt
    is drawn, relative to the others.

    Args:
        source: an existing file; the name of a list under `prompts/`, without its suffix; or a
            template itself, such as `a {color} {animal}`.

    Returns:
        The prompts in the order of the file; never empty.

    Raises:
        UsageError: no such list or file; a file with no prompt in it; a line that cannot be read
            (its number is named).
    """
    name = str(source)
    if is_template(name) and not _is_file(name):
        return inline_template(name)
    path = find_prompts(name)
    where = f"prompt file {path}"
    if path.suffix == ".parquet":
        prompts: Sequence[Prompt] = _read_parquet(path)
    else:
        text = _read_text(path)
        if path.suffix in (".yaml", ".yml"):
            return read_templates(text, where=where)
        prompts = _READERS[path.suffix](text, where)
    if not prompts:
        raise UsageError(f"{where}: no prompt in it; expected one a line")
    return prompts


def list_prompts() -> list[str]:
    """Return the names of the prompt lists under `prompts/`, sorted."""
    folder = resource_path("prompts")
    if not folder.is_dir():
        return []
    return sorted({path.stem for path in folder.iterdir() if path.suffix in SUFFIXES})


def describe_prompts(name: str) -> str:
    """Return one line about a list: how many prompts, and what its file says of itself."""
    lines = find_prompts(name).read_text(encoding="utf-8").splitlines()
    about = next((line.lstrip("# ") for line in lines[:1] if line.startswith("#")), "")
    return f"{len(load_prompts(name)):>7} prompts  {about}".rstrip()


def find_prompts(source: str) -> Path:
    """Return the file of a prompt list.

    Raises:
        UsageError: there is none; another name is proposed.
    """
    if not source.strip():
        raise UsageError("the name of the prompt list is empty; expected a name or a file")
    path = Path(source).expanduser()
    if _is_file(source):
        if path.suffix not in SUFFIXES:
            raise UsageError(
                f"prompt file {source!r} ends in {path.suffix!r}; expected {_EXPECTED}"
            )
        return path
    if path.name == source:
        for suffix in SUFFIXES:
            named = resource_path("prompts", source + suffix)
            if _is_file(named):
                return named
    names = list_prompts()
    raise UsageError(
        f"prompts {source!r}: no such list or file{suggest(source, names)}; expected {_EXPECTED}, "
        f"a template such as 'a {{color}} {{animal}}', or one of the lists "
        f"{', '.join(names) or '(none found)'}"
    )


def _is_file(path: str | Path) -> bool:
    """Whether there is such a file; `Path.is_file` raises for a name too long to be one."""
    return os.path.isfile(os.path.expanduser(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompt file {path}: cannot be read as UTF-8 text: {error}; save it as UTF-8"
        ) from error


def _read_lines(text: str, where: str) -> list[Prompt]:
    lines = (line.strip() for line in text.split("\n"))
    return [Prompt(line) for line in lines if line and not line.startswith("#")]


def _read_jsonl(text: str, where: str) -> list[Prompt]:
    return [
        _from_json(line, where=f"{where}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)  # JSON may hold U+2028
        if line.strip()
    ]


def _from_json(line: str, *, where: str) -> Prompt:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f'{where}: {line.strip()!r}; expected an object such as {{"prompt": "…"}}')
    return make_prompt(values, where=where)


def _read_csv(text: str, where: str) -> list[Prompt]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        index = columns[:1] == [""]
        named = columns[1:] if index else columns
        _check_columns(named, where)
        if "" in named:
            raise UsageError(
                f"{where}: one of the columns {', '.join(map(repr, columns))} has no name; name it "
                "in the header, or remove it"
            )
        prompts = []
        for row in reader:
            place = f"{where}, line {reader.line_num}"
            if None in row or None in row.values():  # values without a column; columns without one
                raise UsageError(f"{place}: expected {len(columns)} columns, as the header has")
            prompts.append(make_prompt({key: row[key] for key in named}, where=place))
        return prompts
    except csv.Error as error:
        raise UsageError(f"{where}, line {reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path) -> list[Prompt]:
    where = f"prompt file {path}"
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise UsageError(
            f"{where}: reading Parquet needs pyarrow, which is not installed: "
            f"{install_command('parquet')}"
        ) from None
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowInvalid) as error:
        raise UsageError(f"{where}: cannot be read as Parquet: {error}") from None
    _check_columns(table.column_names, where)
    rows: Iterable[dict[str, Any]] = table.to_pylist()
    return [make_prompt(row, where=f"{where}, row {i}") for i, row in enumerate(rows, start=1)]


_READERS = {".txt": _read_lines, ".jsonl": _read_jsonl, ".csv": _read_csv}


def _check_columns(columns: Sequence[str], where: str) -> None:
    repeated = sorted({name for name in columns if list(columns).count(name) > 1})
    if repeated:
        raise UsageError(f"{where}: the column {repeated[0]!r} is there twice")
    if "prompt" not in columns:
        raise UsageError(
            f"{where}: no column 'prompt'{suggest('prompt', columns)}; its columns: "
            f"{', '.join(columns) or 'none'}"
        )


def make_prompt(values: Mapping[str, Any], *, where: str) -> Prompt:
    """Make a prompt of the fields of one line: `prompt`, perhaps `weight`, and metadata.

    Raises:
        UsageError: the text or the weight is not what it has to be.
    """
    metadata = dict(values)
    text, weight = metadata.pop("prompt", None), metadata.pop("weight", 1.0)
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f'{where}: "prompt" is {text!r}; expected text')
    return Prompt(text.strip(), metadata, read_weight(weight, where=where))


def prompts_by_image(
    files: Sequence[Path], prompts: Sequence[Prompt], *, where: str
) -> list[Prompt]:
    """Return each image file's prompt: that whose `image` shares the longest end of its path.

    Of two that share as much, one that is the end of the file's path as a whole goes before one
    that differs from it further up.

    Args:
        files: N image files.
        prompts: with a path under `image` in their metadata, or the end of one.
        where: what the prompts are, for messages.

    Returns:
        N prompts.

    Raises:
        UsageError: a file that no prompt names, or several prompts do alike; or several files with
            a prompt that names at most one of them as a whole.
    """
    by_name: dict[str, list[tuple[list[str], Prompt]]] = {}
    for prompt in prompts:
        parts = _parts(str(prompt.metadata["image"]))
        by_name.setdefault(parts[-1] if parts else "", []).append((parts, prompt))
    missing = [file.name for file in files if file.name not in by_name]
    if missing:
        raise UsageError(
            f"{where} name no image {missing[0]!r} ({len(missing)} of {len(files)} images have no "
            "prompt)"
        )
    chosen: list[Prompt] = []
    owners: dict[str, tuple[Path, bool]] = {}
    for file in files:
        own = _parts(os.path.abspath(file))
        ranked: dict[tuple[int, bool], list[Prompt]] = {}
        for parts, prompt in by_name[file.name]:
            shared = len(os.path.commonprefix([own[::-1], parts[::-1]]))
            ranked.setdefault((shared, shared == len(parts)), []).append(prompt)
        _, whole = rank = max(ranked)
        first, *others = ranked[rank]
        image = str(first.metadata["image"])
        rival = next((prompt for prompt in others if prompt != first), None)
        if rival is not None:
            raise UsageError(
                f"{where}: the image {str(file)!r} may be {image!r} ({first.text!r}) or "
                f"{str(rival.metadata['image'])!r} ({rival.text!r}); expected one prompt an image: "
                'give more of its path under "image"'
            )
        owner, all_whole = owners.setdefault(image, (file, whole))
        if _parts(os.path.abspath(owner)) != own and not (all_whole and whole):
            raise UsageError(
                f"{where}: both {str(owner)!r} and {str(file)!r} may be the image {image!r}; "
                'expected a prompt of its own for each, or one whose "image" is what the ends of '
                "both paths share"
            )
        chosen.append(first)
    return chosen


def _parts(path: str) -> list[str]:
    """Return the names of a path, without `.` and `..` where it says what they are."""
    return list(Path(os.path.normpath(path)).parts)
