"""The training loop of the embedded models.

AdamW, cosine schedule, EMA, resumable at every checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_grpo.checkpoint import Checkpoints, closed
from diffusion_grpo.errors import UsageError


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
        workers: processes that make batches ahead of time; 0: one thread of this process, which
            is best where the training itself uses the cores.
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
    workers: int = 0
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
    inputs: Mapping[str, Any] | None = None,
) -> Any:
    """Minimize a loss, resuming from the latest checkpoint in `directory`.

    An interrupt (Ctrl-C) saves the steps that are done. What is trained is recorded beside the
    checkpoints, and only the same is resumed.

    Args:
        params: initial parameters, a pytree of float32 arrays.
        loss_fn: (params, batch, key) → (loss, metrics).
        batch_fn: step → batch of NumPy arrays; a function of the step alone, called in another
            thread, or in other processes (which need a function of a module, not a closure).
        config: see `FitConfig`.
        directory: where checkpoints are kept.
        key: random key; step i uses `fold_in(key, i)`.
        name: what the progress lines are headed with.
        inputs: what else the batches and the loss depend on, as JSON holds it; `digest` for arrays.

    Returns:
        The trained parameters: their running average if `config.ema` is above zero.

    Raises:
        UsageError: the checkpoints in `directory` are of other inputs, or of another configuration,
            key or start.
    """
    settings = dataclasses.asdict(config)
    for unimportant in ("workers", "save_every", "log_every"):
        del settings[unimportant]
    arrays = {"key": digest(jax.random.key_data(key)), "start": digest(params)}
    recorded = dict(inputs or {}) | settings | arrays
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
    _check_record(directory, recorded, begun=start > 0)
    if start:
        # Orbax knows dicts, lists and arrays; the modules' own containers are put back around the
        # leaves.
        start, found, _ = checkpoints.restore({"leaves": jax.tree.leaves(state)})
        state = jax.tree.unflatten(jax.tree.structure(state), found["leaves"])
        print(f"{name}: resumed at step {start}", flush=True)
    began = time.monotonic()
    steps, reached = range(start, config.steps), (start, state)
    with closed(checkpoints):
        try:
            made = batches(batch_fn, steps, workers=config.workers)
            for step, batch in zip(steps, made, strict=True):
                state, metrics = step_fn(reached[1], batch, jnp.int32(step))
                reached = (step + 1, state)  # at once: an interrupt may come between any two lines
                done = step + 1
                if done % config.log_every == 0 or done == config.steps:
                    seconds = (time.monotonic() - began) / (done - start)
                    values = " ".join(f"{k} {float(v):.4f}" for k, v in sorted(metrics.items()))
                    print(
                        f"{name}: step {done}/{config.steps} {values} {seconds:.3f} s/step, "
                        f"{seconds * (config.steps - done) / 60:.1f} min left",
                        flush=True,
                    )
                if done % config.save_every == 0 or done == config.steps:
                    checkpoints.save(done, {"leaves": jax.tree.leaves(state)})
        except KeyboardInterrupt:
            done, state = reached
            if done > start and done != checkpoints.latest:
                checkpoints.save(done, {"leaves": jax.tree.leaves(state)})
            print(f"{name}: stopped after {done} steps; the same command goes on", flush=True)
            raise
    return state["ema"] if config.ema else state["params"]


def digest(tree: Any) -> str:
    """Return 16 hexadecimal digits that tell a tree of arrays from others: of its SHA-256."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]


def _check_record(directory: Path, recorded: Mapping[str, Any], *, begun: bool) -> None:
    """Write what is trained beside `directory`, or find it as it was.

    Raises:
        UsageError: something else was begun there.
    """
    path = directory.with_name(f"{directory.name}.json")
    if begun:
        before = json.loads(path.read_text()) if path.is_file() else {}
        for name, value in recorded.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{directory} was begun with {name} {before.get(name, 'unknown')}, and now it "
                    f"is {value}; expected the same command as before, with the same models before "
                    "it: give another --build, or remove this folder to train it anew"
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recorded, indent=2) + "\n")


def batches(
    batch_fn: Callable[[int], Any], steps: range, *, workers: int = 0, ahead: int = 4
) -> Iterator[Any]:
    """Yield `batch_fn(step)` for each step, in order, made ahead of time.

    Args:
        batch_fn: a function of the step alone; see `fit`.
        steps: the steps.
        workers: processes that make them; 0: one thread of this process.
        ahead: batches that are ready or being made, beyond one for each worker.

    Raises:
        Exception: what `batch_fn` raised, at the step that raised it.
    """
    executor: Executor
    if workers:
        # A forked copy of a process that runs JAX can hang: start new ones.
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, mp_context=spawn)
    else:
        executor = ThreadPoolExecutor(1)
    with executor:
        pending: collections.deque[Future[Any]] = collections.deque()
        todo = iter(steps)
        try:
            for step in itertools.islice(todo, workers + ahead):
                pending.append(executor.submit(batch_fn, step))
            while pending:
                batch = pending.popleft().result()
                pending.extend(
                    executor.submit(batch_fn, step) for step in itertools.islice(todo, 1)
                )
                yield batch
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
