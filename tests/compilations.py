"""Which programs XLA compiles, by what JAX tells its listeners."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """Collect the compilations within, one entry each."""
    compiled = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
