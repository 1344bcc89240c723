"""Which programs XLA compiles, by what JAX tells its listeners."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Collect the names of the functions that are compiled within."""
    compiled = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about["fun_name"].removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
