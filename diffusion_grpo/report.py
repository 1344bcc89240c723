"""A run, or several, as one HTML page that needs nothing else: `report.html`.

The page is built from files of the run directory: `config.yaml`, `metrics.jsonl`, `events.jsonl`,
the gallery's sheets, and whether and why the run has ended (`evaluation.json`, `early_stop.json`).
Charts are drawn by uPlot (MIT License), whose code stands in the page.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from PIL import Image

from diffusion_grpo.errors import UsageError
from diffusion_grpo.events import EVENTS_FILE, read_events
from diffusion_grpo.gallery import Entry, Gallery
from diffusion_grpo.metrics import METRICS_FILE, metric_meanings, read_metrics
from diffusion_grpo.output_files import write_whole
from diffusion_grpo.prompts import evaluated_on
from diffusion_grpo.report_warnings import run_warnings

REPORT_FILE = "report.html"
EARLY_STOP_FILE = "early_stop.json"
PICTURE_BYTES = 16_000_000  # of all sheets in a page; base64 makes a third more of it
_MAX_POINTS = 3000  # of a curve
_SMALLEST_TILE = 32
_MAX_EVENTS = 300  # the last ones in a page
_T = TypeVar("_T")
_PAGE = Path(__file__).with_name("report_page")


def write_report(run_dir: str | Path, *, path: str | Path | None = None) -> Path:
    """Write a run's page beside its metrics, replacing an older one as a whole.

    Args:
        run_dir: a run.
        path: another file to write.

    Returns:
        The file.

    Raises:
        UsageError: no run there, or the file cannot be written.
    """
    path = Path(run_dir) / REPORT_FILE if path is None else Path(path)
    return save_page(path, report_page([run_dir]))


def save_page(path: Path, page: str) -> Path:
    """Write a page as a whole, so that a browser never reads half of it.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        write_whole(path, page)
    except OSError as error:
        raise UsageError(f"report {str(path)!r} cannot be written: {error.strerror}") from None
    return path


def report_page(
    run_dirs: Sequence[str | Path], *, live: float = 0, budget: int = PICTURE_BYTES
) -> str:
    """Return the page of one run, or of several to compare.

    Args:
        run_dirs: runs; their curves share the charts, and one at a time shows its pictures.
        live: seconds between two looks for news at the server that serves the page; 0 for a page
            that stands alone.
        budget: bytes of all pictures in a page that stands alone.

    Raises:
        UsageError: no run given, or a directory that holds none.
    """
    data = report_data(run_dirs, live=live, budget=budget)
    title = " · ".join(run["name"] for run in data["runs"])
    parts = {
        "TITLE": html.escape(title),
        "CONNECT": "'self'" if live else "'none'",
        # JSON has no other place for "<" than text, so this changes no value; and no text can end
        # the script element.
        "DATA": _plain_json(data).replace("<", "\\u003c"),
        "UPLOT_CSS": _asset("uPlot.min.css"),
        "UPLOT_JS": _asset("uPlot.iife.min.js"),
        "CSS": _asset("page.css"),
        "JS": _asset("page.js"),
    }
    pieces = _asset("page.html").split("@")  # text, name, text, name, …, text: filled in only once
    return "".join(parts[piece] if index % 2 else piece for index, piece in enumerate(pieces))


def report_data(
    run_dirs: Sequence[str | Path], *, live: float = 0, budget: int = PICTURE_BYTES
) -> dict[str, Any]:
    """Return what the page shows, for JSON; pictures are data URLs, or URLs of a live server.

    Raises:
        UsageError: no run given, or a directory that holds none.
    """
    if not run_dirs:
        raise UsageError("no run given: name one or more run directories")
    names = different_names([Path(run_dir) for run_dir in run_dirs])
    runs = []
    for number, (run_dir, name) in enumerate(zip(run_dirs, names, strict=True)):
        gallery = Gallery(run_dir)
        sheets = gallery.entries("evaluation"), gallery.entries("rollout")
        run = _read_run(Path(run_dir), sheets[0]) | {"name": name}
        runs.append(run)
        if live:
            run["evaluations"], run["rollouts"] = (
                [
                    _shown(entry, f"sheet/{number}/{entry.sheet}?{_stamp(gallery, entry)}")
                    for entry in e
                ]
                for e in sheets
            )
        else:
            _add_pictures(run, gallery, *sheets, budget // len(run_dirs))
    return {"runs": runs, "docs": metric_meanings(), "live": live}


def read_files(run_dirs: Sequence[str | Path]) -> list[tuple[str, int, int]]:
    """Return (path, time of the last change in ns, bytes) of the files that `report_data` reads.

    Where they are equal, so is what the page shows.
    """
    found = []
    names = ("config.yaml", METRICS_FILE, EVENTS_FILE, EARLY_STOP_FILE, "evaluation.json")
    for directory in map(Path, run_dirs):
        gallery = Gallery(directory)
        paths = [directory / name for name in names]
        for path in (*paths, gallery.index("evaluation"), gallery.index("rollout")):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((str(path), status.st_mtime_ns, status.st_size))
    return found


def _read_run(directory: Path, evaluations: Sequence[Entry]) -> dict[str, Any]:
    """Return what a run says but its pictures."""
    config = directory / "config.yaml"
    if not config.is_file() or not (directory / METRICS_FILE).is_file():
        raise UsageError(
            f"{str(directory)!r} holds no run: expected a run directory with config.yaml and "
            f"{METRICS_FILE}"
        )
    text = config.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    rows = read_metrics(directory)
    lists = values["prompts"]
    evaluated = evaluated_on(lists["heldout"], lists["heldout_share"])
    gold = dict((evaluations[-1].summary or {}).get("gold", {})) if evaluations else {}
    told = run_warnings(rows, evaluations, gold, evaluated)
    stop = directory / EARLY_STOP_FILE
    stopped = json.loads(stop.read_text(encoding="utf-8")) if stop.is_file() else None
    done = rows[-1]["iteration"] + 1 if rows else 0
    if (directory / "evaluation.json").is_file():
        status = f"stopped early after {done} iterations" if stopped else "finished"
    else:
        status = f"{done} of {values['run']['iterations']} iterations so far"
    return {
        "directory": str(directory),
        "status": status,
        "iterations": values["run"]["iterations"],
        "config": text,
        "evaluated": evaluated,
        "gold": list(gold),
        "single": len(values["reward"]["rewards"]) == 1,
        "warnings": ([stopped["reason"]] if stopped else []) + told,
        "metrics": _columns(_thinned(rows)),
        "seconds": _training_seconds(rows, done),
        "events": read_events(directory)[-_MAX_EVENTS:],
        "rollouts_left_out": 0,
    }


def _thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows enough to draw a curve: at even intervals, the last, and all evaluations."""
    every = max(1, math.ceil(len(rows) / _MAX_POINTS))
    return [
        row
        for number, row in enumerate(rows)
        if number % every == 0 or row is rows[-1] or any(name.startswith("eval/") for name in row)
    ]


def _training_seconds(rows: list[dict[str, Any]], done: int) -> float | None:
    """Return how long the iterations took; those without a row as long as the others."""
    times = [row["time/iteration"] for row in rows if "time/iteration" in row]
    return sum(times) / len(times) * done if times else None


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return name → one value a row; what is missing, NaN or infinite is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [_finite(row.get(name)) for row in rows] for name in ("iteration", *names)}


def _finite(value: Any) -> Any:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def different_names(directories: Sequence[Path]) -> list[str]:
    """Return the directories' names, with as many parents as tell them apart."""
    paths = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, paths))):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(directory) for directory in directories]


def _shown(entry: Entry, source: str) -> dict[str, Any]:
    fields = {
        name: getattr(entry, name)
        for name in ("iteration", "columns", "tile", "prompts", "scores", "advantages", "group")
    }
    summary = entry.summary or {}
    measured = {f"eval/{name}": value for name, value in summary.get("metrics", {}).items()}
    return fields | {
        "source": source,
        "tasks": entry.tasks,
        "summary": summary,
        "metrics": {name: _finite(value) for name, value in measured.items()},
    }


def _stamp(gallery: Gallery, entry: Entry) -> int:
    path = gallery.folder / entry.sheet
    return path.stat().st_mtime_ns if path.is_file() else 0


def _add_pictures(
    run: dict[str, Any],
    gallery: Gallery,
    evaluations: list[Entry],
    rollouts: list[Entry],
    budget: int,
) -> None:
    """Put the sheets into the page as data URLs, within a number of bytes.

    Evaluations have up to half of it and rollouts the rest. What does not fit is reduced in size,
    down to 32 pixels a tile; what would not fit even then is left out at even intervals, the first
    and the last staying.
    """
    shown = _fit(gallery, evaluations, budget // 2)
    used = sum(len(data) for _, data in shown)
    rest = _fit(gallery, rollouts, budget - used)
    run["evaluations"] = [_shown(entry, _data_url(data)) for entry, data in shown]
    run["rollouts"] = [_shown(entry, _data_url(data)) for entry, data in rest]
    run["rollouts_left_out"] = len(rollouts) - len(rest)


def _fit(gallery: Gallery, entries: list[Entry], budget: int) -> list[tuple[Entry, bytes]]:
    files = [(e, gallery.folder / e.sheet) for e in entries if (gallery.folder / e.sheet).is_file()]
    sizes = [path.stat().st_size for _, path in files]
    if sum(sizes) > budget:
        # Only what can be kept is read and reduced, which takes long: the largest sheet says how
        # much smaller they become, and 0.9 leaves room for where they differ.
        entry, path = files[sizes.index(max(sizes))]
        data = path.read_bytes()
        least = sum(sizes) * len(_reduced(entry, data, 0.0, 40)[1]) / len(data)
        files = _evenly(files, int(0.9 * len(files) * budget / least))
    sheets = [(entry, path.read_bytes()) for entry, path in files]
    for quality in (60, 40):
        size = sum(len(data) for _, data in sheets)
        if size <= budget:
            return sheets
        # Bytes go about with the area; 0.9 leaves room for what does not.
        factor = min(1.0, 0.9 * math.sqrt(budget / size) * (1.25 if quality == 60 else 1.0))
        sheets = [_reduced(entry, data, factor, quality) for entry, data in sheets]
    size = sum(len(data) for _, data in sheets)
    while size > budget and len(sheets) > 2:
        sheets = _evenly(sheets, min(len(sheets) - 1, int(len(sheets) * budget / size)))
        size = sum(len(data) for _, data in sheets)
    return sheets


def _evenly(items: list[_T], keep: int) -> list[_T]:
    """Return so many of the items at even intervals, at least the first and the last."""
    if keep >= len(items) or len(items) <= 2:
        return items
    keep = max(2, keep)
    return [items[round(i * (len(items) - 1) / (keep - 1))] for i in range(keep)]


def _reduced(entry: Entry, data: bytes, factor: float, quality: int) -> tuple[Entry, bytes]:
    """Return a sheet reduced by a factor, but to no less than `_SMALLEST_TILE`, and its entry."""
    longest = max(entry.tile)
    factor = min(1.0, max(factor, _SMALLEST_TILE / longest))
    tile = (max(1, round(entry.tile[0] * factor)), max(1, round(entry.tile[1] * factor)))
    with Image.open(io.BytesIO(data)) as sheet:
        across, down = sheet.width // entry.tile[0], sheet.height // entry.tile[1]
        small = sheet.convert("RGB").resize(
            (across * tile[0], down * tile[1]), Image.Resampling.BOX
        )
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, method=4)
    return dataclasses.replace(entry, tile=tile), buffer.getvalue()


def _data_url(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def _asset(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")


def _plain_json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
