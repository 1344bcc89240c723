"""Compiled programs that are shared by all who need the same one in a process.

`jax.jit` knows a function by its identity, so that a function defined anew for every run, or for
every call of `generate`, would be traced and compiled anew. What makes programs here is therefore
called through a cache: equal arguments, which are the structure that is compiled in, return the
same program, and what that has compiled stays.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from diffusion_grpo.models.kernels import VARIABLE

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Of each kind, the least recently asked for go first; a program holds no weights.
MOST = 32


def shared_programs(make: Callable[_P, _T]) -> Callable[_P, _T]:
    """Call a maker of compiled programs once for equal arguments.

    Args:
        make: its arguments have to be hashable, and to say all that its programs depend on; arrays
            are arguments of the programs.
    """

    @functools.lru_cache(MOST)
    def cached(attention: str | None, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        del attention
        return make(*args, **kwargs)

    @functools.wraps(make)
    def of(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        # Read while a program is traced, as is the device that is planned for, which JAX minds.
        return cached(os.environ.get(VARIABLE), *args, **kwargs)

    return of


# XLA multiplies what is multiplied by several matrices by all of them side by side, and copies the
# parts out of the product. Of large ones that costs more than it saves, and there are many with an
# adapter: its A is put beside every layer's own matrix.
GPU_OPTIONS: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 1}


def network_jit(function: Callable[_P, _T], **kwargs: Any) -> Callable[_P, _T]:
    """Compile a program that runs a network: `jax.jit` with XLA's options for the device.

    Args:
        function: what to compile; its program is not to be called within another.
        **kwargs: as of `jax.jit`.
    """
    gpu = jax.default_backend() in ("gpu", "cuda", "rocm")
    return jax.jit(function, compiler_options=GPU_OPTIONS if gpu else None, **kwargs)
