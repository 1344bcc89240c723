"""The memory of a planned run on each device, as a function of its two microbatches."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_grpo.costs import Cost
from diffusion_grpo.mesh import parameter_spec

_PROGRAM = "while "  # parts of programs, of which one runs at a time


def size_of(tree: Any) -> int:
    """Return the bytes of a pytree of arrays or shapes."""
    return sum(
        int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def share_of(tree: Any, size: int) -> int:
    """Return the bytes that each of `size` devices has of parameters divided as `mesh.divided`."""
    return sum(
        size_of(leaf) // (size if "fsdp" in parameter_spec(leaf.shape, size) else 1)
        for leaf in jax.tree.leaves(tree)
    )


def peak_of(parts: Mapping[str, int]) -> int:
    """Return the bytes of all parts, those of the programs counted once: the largest."""
    programs = [size for name, size in parts.items() if name.startswith(_PROGRAM)]
    held = sum(size for name, size in parts.items() if not name.startswith(_PROGRAM))
    return held + max(programs)


def linear_peak(
    costs: Mapping[int, Cost], cost_of: Callable[[int], Cost], *, beside: int = 0
) -> Callable[[int], float]:
    """Return images at a time → peak bytes of a program: a straight line through two sizes.

    Args:
        costs: of one size or two: images at a time → cost; of none, the program is left out.
        cost_of: images at a time → cost; called for twice the size, where there is one and another
            is asked for.
        beside: bytes that the program takes besides, whatever the images.
    """
    if not costs:
        return lambda size: 0.0
    size, *others = costs

    @functools.cache
    def slope() -> float:
        other = others[0] if others else 2 * size
        cost = costs[other] if others else cost_of(other)
        return (cost.peak - costs[size].peak) / (other - size)

    def peak(other: int) -> float:
        return beside + costs[size].peak + (slope() * (other - size) if other != size else 0.0)

    return peak


@dataclasses.dataclass(frozen=True)
class Memory:
    """What one device holds; sizes and numbers of images are its own.

    Attributes:
        kept: part → bytes, whatever the microbatches.
        gradient: bytes of one gradient.
        images: drawn in an iteration.
        learned: of these, those that the update is given.
        sampled: images at a time → peak bytes of the program that samples them.
        decoded: of the one that decodes them.
        updated: of the one that differentiates them.
        slack: memory really taken, over what has to be alive.
        lanes: number of microbatches → how many are at work at the same time.
    """

    kept: Mapping[str, int]
    gradient: int
    images: int
    learned: int
    sampled: Callable[[int], float]
    decoded: Callable[[int], float]
    updated: Callable[[int], float]
    slack: float
    lanes: Callable[[int], int]

    def parts(self, drawn: int, differentiated: int) -> dict[str, int]:
        """Return part → bytes, with so many images drawn and differentiated at a time."""
        return (
            dict(self.kept)
            | {"gradient": self._gradient(differentiated)}
            | self._drawing(drawn)
            | self._updating(differentiated)
        )

    def fitting(self, drawn: int, differentiated: int, limit: float) -> dict[str, int]:
        """Return the microbatches that are too large → the largest that fit; 0 for none.

        What is drawn at a time has to fit beside the gradients of an update that fits.
        """
        found = {}
        if self.updating_bytes(differentiated) > limit:
            differentiated = found["grpo.microbatch"] = self.most_differentiated(limit)
        if differentiated and self.drawing_bytes(drawn, differentiated) > limit:
            found["rollout.microbatch"] = _largest(
                self.images, lambda size: self.drawing_bytes(size, differentiated) <= limit
            )
        return found

    def most_differentiated(self, limit: float) -> int:
        """Return how many images can be differentiated at a time; 0 for none."""
        return _largest(self.learned, lambda size: self.updating_bytes(size) <= limit)

    def _held(self, differentiated: int) -> int:
        return sum(self.kept.values()) + self._gradient(differentiated)

    def drawing_bytes(self, drawn: int, differentiated: int) -> int:
        """Return the bytes taken while `drawn` images are drawn at a time, gradients beside."""
        return self._held(differentiated) + max(self._drawing(drawn).values())

    def updating_bytes(self, differentiated: int) -> int:
        """Return the bytes taken while so many images are differentiated at a time."""
        return self._held(differentiated) + sum(self._updating(differentiated).values())

    def _gradient(self, size: int) -> int:
        return self.gradient * self.lanes(self.learned // size)

    def _drawing(self, size: int) -> dict[str, int]:
        peaks = {"sampling": self.sampled(size), "decoding": self.decoded(size)}
        return self._programs(peaks, self.images // size)

    def _updating(self, size: int) -> dict[str, int]:
        return self._programs({"updating": self.updated(size)}, self.learned // size)

    def _programs(self, peaks: Mapping[str, float], number: int) -> dict[str, int]:
        taken = self.slack * self.lanes(number)
        return {f"{_PROGRAM}{name}": round(taken * peak) for name, peak in peaks.items()}


def _largest(images: int, fits: Callable[[int], bool]) -> int:
    """Return the largest divisor of a number of images that fits, or 0."""
    return max((n for n in range(1, images + 1) if images % n == 0 and fits(n)), default=0)
