"""Save and restore training state with Orbax.

Atomic, the last few kept, restored onto a template's types.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion_grpo.errors import RewardError


class Checkpoints:
    """Numbered checkpoints of a pytree of arrays in a directory.

    Orbax writes each into a temporary folder and renames it, so that a killed process leaves whole
    checkpoints only.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2):
        """Open (and make, if absent) the directory; `keep` is how many of the latest stay."""
        from orbax.checkpoint import v1 as ocp  # 3 seconds: only when needed

        policy = ocp.training.preservation_policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(
            str(Path(directory).resolve()),
            preservation_policy=policy,  # pyright: ignore[reportArgumentType]  Orbax's own mismatch
        )

    @property
    def latest(self) -> int | None:
        """The number of the last whole checkpoint, or None."""
        metadata = self._checkpointer.latest
        return None if metadata is None else metadata.step

    def save(self, step: int, tree: Any) -> None:
        """Write `tree` as checkpoint `step`, unless it is there; wait until it is on disk."""
        if self.latest != step:
            self._checkpointer.save(step, tree)

    @contextlib.contextmanager
    def kept(self, step: int, tree: Any, *, resume: str) -> Iterator[None]:
        """Save `tree` as checkpoint `step` if a reward fails within.

        Args:
            step: the iterations that made it; at 0 there is nothing to keep.
            tree: what is whole at this point.
            resume: the command that goes on with the run.

        Raises:
            RewardError: what was raised within, and what to do next.
        """
        try:
            yield
        except RewardError as error:
            if step:
                self.save(step, tree)
            raise RewardError(
                f"{error}\niterations kept: {step}; mend the reward, then go on with: {resume}"
            ) from error

    def restore(self, template: Any, step: int | None = None) -> Any:
        """Read checkpoint `step` (default: the latest) with `template`'s structure and types."""
        return self._checkpointer.load(self.latest if step is None else step, template)

    def close(self) -> None:
        """Release the directory."""
        self._checkpointer.close()
