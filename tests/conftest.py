"""What every test runs under: strict JAX, checked shapes and types, no network."""

import os
import tempfile
from importlib.metadata import version
from typing import Any

# Before anything imports JAX or the hub client; the environment reaches subprocesses too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile much and run little: a third of the time to compile a UNet's gradient.
_flags = ["--xla_backend_optimization_level=0"]
# Later ones end the process at the unknown flag (`compiling.py` would import JAX too early).
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))
# A cache of compiled programs for each worker of pytest-xdist and its subprocesses, without a limit
# of size: under a limit JAX reads the whole folder, behind a lock, for every program that it adds,
# and without a lock two workers could read what the other is still writing. The controller loads
# this file before it starts workers, and they inherit its environment.
_compilation_cache = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compilation_cache = tempfile.TemporaryDirectory(prefix="diffusion-grpo-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compilation_cache.name
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] += "/" + os.environ["PYTEST_XDIST_WORKER"]
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
from jaxtyping._import_hook import JaxtypingTransformer  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

_instrument = JaxtypingTransformer.visit_FunctionDef


def _instrument_alone(transformer: Any, node: Any) -> Any:
    """Check a function, not those that it defines: their checks would be compiled at each call."""
    body, node.body = node.body, []
    _instrument(transformer, node)
    node.body = body
    return node


JaxtypingTransformer.visit_FunctionDef = _instrument_alone

# Shapes and types are checked in tests only: the package is instrumented as it is imported.
install_import_hook("diffusion_grpo", "typechecking.typechecker")


def pytest_unconfigure() -> None:
    if _compilation_cache is not None:
        _compilation_cache.cleanup()
