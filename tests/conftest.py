"""What every test runs under: strict JAX, checked shapes and types, no network."""

import os
import tempfile

# Before anything imports JAX or the hub client; the environment reaches subprocesses too.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
_compilation_cache = tempfile.TemporaryDirectory(prefix="diffusion-grpo-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _compilation_cache.name)

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and types are checked in tests only: the package is instrumented as it is imported.
install_import_hook("diffusion_grpo", "typechecking.typechecker")


def pytest_unconfigure() -> None:
    _compilation_cache.cleanup()
