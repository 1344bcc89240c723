"""Compiling as users do, where a result has to be exact."""

from functools import partial

import jax

# Equal to the last bit is said of XLA's own options, not of those that the tests compile with.
as_users_compile = partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True},
)
