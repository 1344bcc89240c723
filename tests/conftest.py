"""What every test runs under: strict JAX, checked shapes and types, no network."""

import os
import tempfile

# Before anything imports JAX or the hub client; the environment reaches subprocesses too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests compile much and run little: a quarter less time to compile.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
# One cache of compiled programs for all tests, their subprocesses and the workers of pytest-xdist:
# the controller loads this file before it starts workers, and they inherit its environment.
_compilation_cache = None
_given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if _given is None:
    _compilation_cache = tempfile.TemporaryDirectory(prefix="diffusion-grpo-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_compilation_cache.name, "locked")
elif os.path.basename(_given) != "locked":  # a locked cache lacks files beside an unlocked one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_given, "locked")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# A limit, far away, makes JAX lock the cache, so that no worker reads what another is writing.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(8 * 2**30))

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and types are checked in tests only: the package is instrumented as it is imported.
install_import_hook("diffusion_grpo", "typechecking.typechecker")


def pytest_unconfigure() -> None:
    if _compilation_cache is not None:
        _compilation_cache.cleanup()
