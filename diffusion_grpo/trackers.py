"""Metrics and pictures for TensorBoard and Weights & Biases, beside `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import io
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from diffusion_grpo.config import Config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.installing import install_command
from diffusion_grpo.metrics import to_number
from diffusion_grpo.output_files import write_whole


@runtime_checkable
class Tracker(Protocol):
    """Where a run's numbers and pictures go."""

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log numbers; `step` is the iterations done."""
        ...

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Log the distribution of `values` [B]."""
        ...

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def make_trackers(config: Config, directory: Path, *, start: int = 0) -> list[Tracker]:
    """Return the trackers that the configuration asks for.

    Args:
        config: the run's; `run.tensorboard` "auto" means where the package is installed.
        directory: the run's.
        start: iterations done before, when the run is resumed.

    Raises:
        UsageError: a tracker that is asked for is not installed.
    """
    check_trackers(config)
    trackers: list[Tracker] = []
    if config.run.tensorboard != "off" and _installed("tensorboard"):
        trackers.append(TensorBoard(directory / "tensorboard", start=start))
    if config.run.wandb_project is not None:
        trackers.append(WeightsAndBiases(config, directory))
    return trackers


def check_trackers(config: Config) -> None:
    """Raise a `UsageError` where a tracker that is asked for is not installed."""
    if config.run.tensorboard == "on" and not _installed("tensorboard"):
        raise UsageError(_missing("run.tensorboard is 'on'", "tensorboard"))
    if config.run.wandb_project is not None and not _installed("wandb"):
        raise UsageError(_missing(f"run.wandb_project is {config.run.wandb_project!r}", "wandb"))


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _missing(what: str, extra: str) -> str:
    return f"{what}, but it is not installed: {install_command(extra)}"


class TensorBoard:
    """An event file under the run's `tensorboard/`, written by TensorBoard's own writer."""

    def __init__(self, folder: Path, *, start: int = 0) -> None:
        """Open the file; what older ones have past `start` is hidden when they are read.

        Args:
            folder: of the event files.
            start: iterations done before; after 0 the untrained model is evaluated anew, too.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        # Classes that protobuf makes at run time: a static import would not know them.
        proto = "tensorboard.compat.proto"
        self._events: Any = importlib.import_module(f"{proto}.event_pb2")
        self._summaries: Any = importlib.import_module(f"{proto}.summary_pb2")
        folder.mkdir(parents=True, exist_ok=True)
        older = any(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        if older:
            kind = self._events.SessionLog  # the run goes on here
            self._add(start + 1 if start else 0, session_log=kind(status=kind.START))

    def _add(self, step: int, **fields: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **fields))

    def _values(self, step: int, values: Sequence[Any]) -> None:
        self._add(step, summary=self._summaries.Summary(value=values))

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log numbers."""
        make = self._summaries.Summary.Value
        self._values(
            step, [make(tag=n, simple_value=to_number(n, value)) for n, value in metrics.items()]
        )

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Log a histogram of 30 bins."""
        values = np.asarray(values, np.float64)
        counts, edges = np.histogram(values, bins=30)
        histogram = self._summaries.HistogramProto(
            min=values.min(),
            max=values.max(),
            num=values.size,
            sum=values.sum(),
            sum_squares=np.square(values).sum(),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        self._values(step, [self._summaries.Summary.Value(tag=name, histo=histogram)])

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture as PNG."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        picture = self._summaries.Summary.Image(
            height=image.height,
            width=image.width,
            colorspace=3,
            encoded_image_string=buffer.getvalue(),
        )
        self._values(step, [self._summaries.Summary.Value(tag=name, image=picture)])

    def close(self) -> None:
        """Write what is left and close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, config: Config, directory: Path) -> None:
        """Start the run, or go on with it where the directory remembers it."""
        import wandb

        remembered = directory / "wandb_id"
        if not remembered.is_file():
            write_whole(remembered, uuid.uuid4().hex[:12])
        self._wandb = wandb
        self._run = wandb.init(
            project=config.run.wandb_project,
            name=directory.name,
            id=remembered.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(directory),
            config=dataclasses.asdict(config),
        )
        self._run.define_metric("*", step_metric="iterations")

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"iterations": step, **values})

    def scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log numbers."""
        self._log(step, {name: to_number(name, value) for name, value in metrics.items()})

    def histogram(self, step: int, name: str, values: np.ndarray) -> None:
        """Log a histogram."""
        self._log(step, {name: self._wandb.Histogram(np.asarray(values).tolist())})

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Log a picture."""
        self._log(step, {name: self._wandb.Image(image)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
