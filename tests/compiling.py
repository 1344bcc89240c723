"""How tests compile: quickly, but as users do where a result has to be exact."""

from functools import partial
from importlib.metadata import version

import jax

# Equal to the last bit is said of XLA's own options, not of those that the tests compile with.
_users = {"xla_backend_optimization_level": 3}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # as in conftest.py
    _users["xla_cpu_use_fusion_emitters"] = True
as_users_compile = partial(jax.jit, compiler_options=_users)
