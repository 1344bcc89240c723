"""The training loop of the embedded models.

AdamW, cosine schedule, EMA, resumable at every checkpoint.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_grpo.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How one model is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: peak; linear warm-up over `warmup` steps, then cosine to 2 % of it.
        warmup: steps.
        weight_decay: AdamW's, on matrices and kernels only.
        max_grad_norm: global gradient norm above which gradients are scaled down.
        beta2: AdamW's second-moment decay.
        ema: decay of the running average of the parameters (0: none).
        save_every: steps between checkpoints.
        log_every: steps between lines of progress.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    beta2: float = 0.99
    ema: float = 0.0
    save_every: int = 500
    log_every: int = 50


def fit(
    params: Any,
    loss_fn: Callable[[Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    batch_fn: Callable[[int], Any],
    *,
    config: FitConfig,
    directory: Path,
    key: jax.Array,
    name: str,
) -> Any:
    """Minimize a loss, resuming from the latest checkpoint in `directory`.

    Args:
        params: initial parameters, a pytree of float32 arrays.
        loss_fn: (params, batch, key) → (loss, metrics).
        batch_fn: step → batch of NumPy arrays; a function of the step alone, called in another
            thread.
        config: see `FitConfig`.
        directory: where checkpoints are kept.
        key: random key; step i uses `fold_in(key, i)`.
        name: what the progress lines are headed with.

    Returns:
        The trained parameters: their running average if `config.ema` is above zero.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        config.learning_rate,
        min(config.warmup, config.steps // 10),
        config.steps,
        0.02 * config.learning_rate,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )

    @jax.jit
    def step_fn(state: dict[str, Any], batch: Any, step: jax.Array) -> tuple[dict[str, Any], Any]:
        gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), gradients = gradient_fn(
            state["params"], batch, jax.random.fold_in(key, step)
        )
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        new = optax.apply_updates(state["params"], updates)
        # A running average that forgets the start: the decay grows from 0 with the step.
        decay = jnp.minimum(config.ema, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state["ema"], new)
        return {"params": new, "opt_state": opt_state, "ema": ema}, metrics | {"loss": loss}

    state = {"params": params, "opt_state": optimizer.init(params), "ema": params}
    checkpoints = Checkpoints(directory)
    start = checkpoints.latest or 0
    if start:
        # Orbax knows dicts, lists and arrays; the modules' own containers are put back around the
        # leaves.
        start, found, _ = checkpoints.restore({"leaves": jax.tree.leaves(state)})
        state = jax.tree.unflatten(jax.tree.structure(state), found["leaves"])
        print(f"{name}: resumed at step {start}", flush=True)
    began = time.monotonic()
    for step, batch in zip(range(start, config.steps), _prefetch(batch_fn, start), strict=False):
        state, metrics = step_fn(state, batch, jnp.int32(step))
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            seconds = (time.monotonic() - began) / (done - start)
            values = " ".join(f"{k} {float(v):.4f}" for k, v in sorted(metrics.items()))
            print(
                f"{name}: step {done}/{config.steps} {values} "
                f"{seconds:.3f} s/step, {seconds * (config.steps - done) / 60:.1f} min left",
                flush=True,
            )
        if done % config.save_every == 0 or done == config.steps:
            checkpoints.save(done, {"leaves": jax.tree.leaves(state)})
    checkpoints.close()
    return state["ema"] if config.ema else state["params"]


def _prefetch(batch_fn: Callable[[int], Any], start: int, depth: int = 4) -> Iterator[Any]:
    """Yield batch_fn(start), batch_fn(start + 1), …, made ahead of time in a daemon thread."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)

    def produce() -> None:
        step = start
        while True:
            try:
                ready.put(batch_fn(step))
            except Exception as error:  # handed to the consumer, which raises it
                ready.put(error)
                return
            step += 1

    threading.Thread(target=produce, daemon=True).start()
    while True:
        item = ready.get()
        if isinstance(item, Exception):
            raise item
        yield item
