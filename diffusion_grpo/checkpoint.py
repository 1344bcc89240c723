"""Save training state with Orbax, in the background; restore it, from an older one if need be.

A checkpoint is written into a temporary folder that is renamed when it is whole. With every array
goes a sum of its bits, so that one that was damaged since is noticed, and not only one that is
truncated.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from diffusion_grpo import processes
from diffusion_grpo.errors import RewardError, RunError, UsageError
from diffusion_grpo.interrupt import StopNow
from diffusion_grpo.mesh import of_all_processes, to_host

DAMAGED = "checkpoints.damaged"  # beside the checkpoints: those that could not be read
# Orbax's "no handler can load this" is a KeyError; a metadata file may hold anything.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
QUALITY = Path("metrics", "metrics")  # in a checkpoint: the file that Orbax keeps its quality in


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: its number.
        tree: what was saved.
        notes: which newer ones could not be read, and whose quality, a line each.
    """

    step: int
    tree: Any
    notes: list[str]


class Checkpoints:
    """Numbered checkpoints of a pytree of arrays in a directory."""

    def __init__(
        self, directory: str | Path, *, keep: int = 2, writes: bool = True, visits: bool = False
    ):
        """Open (and make, if absent) the directory.

        Args:
            directory: of the checkpoints.
            keep: how many of the latest stay; the one of the highest `quality` stays besides.
            visits: what is there is only read, maybe while a run writes.
            writes: whether this process moves what is damaged out of the way; of several, one does.

        Raises:
            UsageError: of a visit, a damaged quality, for which no checkpoint can be opened.
        """
        from orbax.checkpoint import v1 as ocp  # 3 seconds: only when needed

        self._directory, self._writes = Path(directory).resolve(), writes
        self._notes = self._without_broken_qualities(delete=not visits) if writes else []
        processes.wait_for_all("the checkpoints to be looked through")
        policies = ocp.training.preservation_policies
        policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    n=1,
                    get_metric_fn=lambda metrics: metrics["quality"],  # pyright: ignore
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )

        def start() -> Any:
            return ocp.training.Checkpointer(
                str(self._directory),
                preservation_policy=policy,  # pyright: ignore[reportArgumentType]
                cleanup_tmp_directories=not visits,
            )

        self._open: Callable[[], Any] = start
        self._checkpointer = start()
        self._response: Any = None
        self._saving: int | None = None  # the checkpoint that is on its way
        self._failed = False

    def _without_broken_qualities(self, *, delete: bool) -> list[str]:
        """Delete each quality that cannot be read: because of one Orbax would open no checkpoint.

        Args:
            delete: where nothing may be changed, the first one is an error instead.

        Returns:
            Which were deleted, a line each.

        Raises:
            UsageError: there is one, and it may not be deleted.
        """
        notes = []
        for file in sorted(self._directory.glob(f"*/{QUALITY}")):
            try:
                float(json.loads(file.read_bytes())["quality"])
            except (ValueError, TypeError, KeyError):
                if not delete:
                    raise UsageError(
                        f"{file} is damaged; expected the quality of its checkpoint. Delete this "
                        "file: the checkpoint is whole without it"
                    ) from None
                file.unlink()
                notes.append(
                    f"the quality of checkpoint {file.parents[1]} was damaged, and is deleted: the "
                    "checkpoint is whole, but kept no longer than others"
                )
        return notes

    @property
    def steps(self) -> list[int]:
        """The numbers of the whole checkpoints, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    @property
    def latest(self) -> int | None:
        """The number of the last whole checkpoint, or None."""
        return max(self.steps, default=None)

    def path(self, step: int) -> Path:
        """Return where checkpoint `step` is."""
        return self._directory / str(step)

    def save(self, step: int, tree: Any, *, quality: float | None = None) -> None:
        """Begin to write `tree` as checkpoint `step`, unless it is there.

        Returns when the arrays are copied to the host, so that they may be donated; `wait` returns
        when they are on disk. A save begun before is waited for.

        Args:
            step: its number.
            tree: of arrays.
            quality: the checkpoint of the highest one is kept.

        Raises:
            RunError: this or the last checkpoint could not be written.
        """
        self.wait()
        if processes.of_leader(step in self.steps, f"checkpoint {step}"):
            return
        held = {"tree": tree, "checksums": checksums(tree)}
        metrics = None if quality is None else {"quality": float(quality)}
        with self._explained(step):
            self._response = self._checkpointer.save_async(step, held, metrics=metrics)
            self._saving = step

    def wait(self) -> None:
        """Wait until what was saved is on disk.

        Raises:
            RunError: it could not be written.
        """
        response, step, self._response = self._response, self._saving, None
        if response is not None and step is not None:
            with self._explained(step):
                response.result()

    def settle(self) -> None:
        """Wait like `wait`, whatever comes of it."""
        with contextlib.suppress(RunError):
            self.wait()

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Say which checkpoint could not be written, and which is the last that was."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueErrors for files
            self._failed = True
            whole = [number for number in self.steps if number != step]
            kept = f"the last one is {self.path(max(whole))}" if whole else "there is none before"
            raise RunError(
                f"checkpoint {self.path(step)} could not be written: {short(error)}; {kept}. Make "
                "room on the disk or check that the folder can be written, then resume the run"
            ) from error

    @contextlib.contextmanager
    def kept(self, step: int, tree: Any, *, resume: str) -> Iterator[None]:
        """Save `tree` as checkpoint `step` if a reward fails within, or the run is asked to stop.

        Args:
            step: the iterations that made it; at 0 there is nothing that a failure would lose.
            tree: what is whole at this point.
            resume: the command that goes on with the run.

        Raises:
            RewardError: what was raised within, and what to do next.
            Preempted, KeyboardInterrupt: of `StopNow`, what its request says.
        """
        try:
            yield
        except StopNow as stop:
            self.save(step, tree)
            self.wait()
            raise stop.request.stopped(resume) from None
        except RewardError as error:
            if step:
                self.save(step, tree)
                self.wait()
            raise RewardError(
                f"{error}\niterations kept: {step}; mend the reward, then go on with: {resume}"
            ) from error

    def restore(self, template: Any) -> Restored:
        """Read the newest checkpoint that is whole, with `template`'s structure, types, shardings.

        Newer ones that cannot be read are moved to `checkpoints.damaged` beside the directory.

        Args:
            template: arrays like those saved, or `template_of` them, beside which no others are in
                memory.

        Raises:
            UsageError: none can be read.
        """
        self.wait()
        damaged: list[tuple[int, str]] = []
        held = _held(template)
        for step in processes.of_leader(self.steps[::-1], "the checkpoints that there are"):
            found, reason = self._read(step, held)
            reasons = processes.exchange(reason, f"checkpoint {step}")
            if any(reasons):  # what one process cannot read, none goes on from
                found, reason = None, next(filter(None, reasons))
            if found is None:
                damaged.append((step, reason))
                continue
            self._set_aside([number for number, _ in damaged])
            notes = [
                f"checkpoint {self.path(number)} cannot be read ({reason}); going on from {step}, "
                f"and it is moved to {DAMAGED}/"
                for number, reason in damaged
            ]
            return Restored(step, found["tree"], [*self._notes, *notes])
        reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged) or "it is empty"
        raise UsageError(
            f"no checkpoint in {self._directory} can be read ({reasons}); expected one of this run "
            f"and its model. Put one back, or delete {self._directory} to begin with the first "
            "iteration"
        )

    def read(self, step: int, template: Any) -> Any:
        """Read checkpoint `step` with `template`'s structure, types and shardings.

        Args:
            step: its number.
            template: as in `restore`.

        Raises:
            UsageError: it cannot be read.
        """
        found, reason = self._read(step, _held(template))
        if found is None:
            raise UsageError(
                f"checkpoint {self.path(step)} cannot be read ({reason}); expected one of this run "
                "and its model"
            )
        return found["tree"]

    def shapes(self, step: int) -> Any:
        """Return the shapes of what checkpoint `step` holds, as it was given to `save`.

        Raises:
            UsageError: it cannot be read.
        """
        try:
            described = self._checkpointer.metadata(step).metadata["tree"]
        except _UNREADABLE as error:
            raise UsageError(
                f"checkpoint {self.path(step)} cannot be read ({short(error)})"
            ) from None
        return jax.tree.map(lambda leaf: leaf.shape, described)

    def _read(self, step: int, template: Any) -> tuple[Any, str]:
        """Return what checkpoint `step` holds, or None and why it cannot be read."""
        found, reason = _loaded(lambda: self._checkpointer.load(step, template))
        if found is None:
            return None, reason
        for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(template), strict=True):
            if got.shape != wanted.shape:
                return None, f"an array of shape {got.shape}, expected {wanted.shape}"
        sums = to_host([checksums(found["tree"]), found["checksums"]])
        if not np.array_equal(*sums):
            return None, "its contents do not have the checksums that they were saved with"
        return found, ""

    def _set_aside(self, steps: list[int]) -> None:
        """Move damaged checkpoints out of the way of new ones of the same numbers."""
        if not steps:
            return
        self._checkpointer.close()
        if self._writes:
            place = self._directory.parent / DAMAGED
            place.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(place / str(step), ignore_errors=True)
                shutil.move(self.path(step), place / str(step))
        processes.wait_for_all("damaged checkpoints to be moved")
        self._checkpointer = self._open()

    def close(self) -> None:
        """Wait for the last save, and release the directory."""
        try:
            self.wait()
        finally:
            # Of a save that failed, which was told, Orbax tells again.
            told = (OSError, ValueError) if self._failed else ()
            with contextlib.suppress(*told):
                self._checkpointer.close()


@contextlib.contextmanager
def closed(checkpoints: Checkpoints) -> Iterator[None]:
    """Close the checkpoints at the end.

    Not where one of several processes fails: that would wait for the others, which go on until
    they are told.
    """
    try:
        yield
    except BaseException:
        if processes.count() == 1:
            checkpoints.close()
        raise
    checkpoints.close()


def _loaded(load: Callable[[], Any]) -> tuple[Any, str]:
    """Return what Orbax loads, or None and why it cannot, with nothing more on stderr.

    Where one array cannot be read, Orbax closes the event loop and forgets the reads of the others.
    Each would tell at length, whenever it is collected, that it was never awaited, could not be
    read either, or found the loop closed, as if what runs then had made it.
    """
    told, log = list[Any](), logging.getLogger("asyncio")
    hook, sys.unraisablehook = sys.unraisablehook, told.append
    quiet, log.disabled = log.disabled, True
    found, reason = None, ""
    try:
        try:
            found = load()
        except _UNREADABLE as error:  # its frames, forgotten below, hold the reads
            reason = short(error)
        if found is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                time.sleep(0.1)  # TensorStore's threads end what they have begun
                gc.collect()
            told.clear()
    finally:
        sys.unraisablehook, log.disabled = hook, quiet
    for other in told:
        hook(other)
    return found, reason


def template_of(tree: Any) -> Any:
    """Return shapes, types and shardings of a tree's arrays, for `Checkpoints.restore`.

    None of the devices' memory is held by it, so that what is restored can take the place of the
    arrays. Those of the host's memory stay what they are.
    """

    def described(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return jax.tree.map(described, tree)


def _held(template: Any) -> dict[str, Any]:
    """Return the template of what is saved of a tree: itself, and its checksums."""
    sums = of_all_processes(jnp.zeros(len(jax.tree.leaves(template)), jnp.uint32))
    return {"tree": template, "checksums": template_of(sums)}


def checksums(tree: Any) -> UInt32[Array, " leaves"]:
    """Return one number for each array of a tree, the sum of its bits as unsigned integers.

    A sum modulo 2³² notices any change of a single element, and is the same however an array is
    laid out over devices.
    """
    return _checksums(jax.tree.leaves(tree))


@jax.jit
def _checksums(leaves: list[Array]) -> Array:
    sums: list[Array] = []
    for leaf in leaves:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
        sums.append(bits.sum(dtype=jnp.uint32))
    return jnp.stack(sums) if sums else jnp.zeros(0, jnp.uint32)


def short(error: BaseException) -> str:
    """Return the first line of an error, without what only a debugger wants."""
    text = re.sub(r"\[[a-z_]+='[^']*'\]", "", str(error)).strip().strip("'\"")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= 200 else first[:197] + "..."
