"""The same iteration in another framework, in a process of its own, timed in turns with ours.

The peer is a program that reads JSON lines: first the work, then `{"do": "iteration"}` until the
end. It answers lines that begin with `@`: `{"ready": …}` once it is warm, then seconds by phase.
"""

from __future__ import annotations

import dataclasses
import json
import queue
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_grpo.config import Config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.lanes import cores
from diffusion_grpo.learning import GRPOLearner
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.steps import choose_steps, update_draw
from diffusion_grpo.workload import Workload

COMPARED = ("sample", "update", "iteration")  # phases that both time


class PeerError(Exception):
    """The peer stopped, or took too long; the message says why."""


class Peer:
    """A peer's process."""

    def __init__(self, command: Sequence[str], spec: dict[str, Any], deadline: float) -> None:
        """Start it on a piece of work; `deadline` is on `time.monotonic`'s clock."""
        self._deadline = deadline
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self._send(spec)

    def __enter__(self) -> Peer:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def ready(self) -> dict[str, Any]:
        """Wait until it is warm; returns its versions and the seconds of the first calls."""
        return self._answer()["ready"]

    def iteration(self) -> dict[str, float]:
        """Have it do one iteration; seconds by phase, and peak memory where it knows it."""
        self._send({"do": "iteration"})
        return self._answer()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None

    def _answer(self) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                raise PeerError("it took longer than --peer-timeout") from None
            if line is None:
                raise PeerError(self._last_words())
            if line.startswith("@"):
                return json.loads(line[1:])
            self._said.append(line.rstrip())

    def _last_words(self) -> str:
        self._process.wait(timeout=10)
        said = [line for line in self._said if line.strip()]
        return f"it ended with code {self._process.returncode}: {' | '.join(said[-3:])}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except ValueError:  # closed while it was read
            pass
        self._lines.put(None)


def check_options(config: Config) -> None:
    """Check that a peer does all the work that the options ask for.

    Raises:
        UsageError: the algorithm or an option is unknown to it, and it would do less.
    """
    if config.grpo.algorithm != "grpo":
        raise UsageError(f"--against knows GRPO alone: grpo.algorithm is {config.grpo.algorithm!r}")
    if config.grpo.updates_per_rollout != 1:
        raise UsageError(
            f"--against compares one update a rollout, and grpo.updates_per_rollout is "
            f"{config.grpo.updates_per_rollout}; give --updates 1"
        )
    if config.model.train_text_encoder:
        raise UsageError(
            "--against trains the UNet alone, and model.train_text_encoder is True; leave it out"
        )
    for section, field, known in (
        ("grpo", "guard", False),
        ("grpo", "dppo_kl", None),
        ("grpo", "ratio_base", "old"),
        ("grpo", "kl_in", "loss"),
        ("grpo", "learn_noise_scale", False),
        ("optim", "optimizer", "adamw"),
    ):
        value = getattr(getattr(config, section), field)
        if value != known:
            raise UsageError(
                f"{section}.{field} is {value!r}, which the peer does not implement; expected "
                f"{known!r} with --against"
            )


def check_unet(unet: UNetConfig) -> None:
    """Check that a peer can run a UNet.

    Raises:
        UsageError: it is conditioned on more than the text's states, as SDXL's.
    """
    if unet.addition_embed_type is not None:
        raise UsageError(
            f"the UNet's addition_embed_type is {unet.addition_embed_type!r}, which the peer does "
            "not implement; expected a checkpoint of Stable Diffusion 1 or 2 with --against"
        )


def peer_spec(work: Workload, mode: str) -> dict[str, Any]:
    """Return the work as the peer is told it; `check_options` and `check_unet` allowed it."""
    config, learner, model = work.config, work.learner, work.model
    assert isinstance(learner, GRPOLearner)
    schedule = learner.schedule(0)
    plan = learner.plan(schedule, 0)
    drawn = update_draw(config.run.seed, 0, 0)
    steps = choose_steps(plan.active, config.grpo.gradient_steps, drawn)
    constants = ("timesteps", "signal_scale", "noise_scale", "next_signal_scale")
    constants += ("direction_scale", "std")
    embeddings = work.conditioning[0]["encoder_hidden_states"]
    return {
        "mode": mode,
        "device": "cpu" if jax.default_backend() == "cpu" else "cuda",
        "threads": cores(),
        "unet": dataclasses.asdict(model.unet.config),
        "vae": dataclasses.asdict(model.vae.config),
        "model": dataclasses.asdict(config.model),
        "optim": dataclasses.asdict(config.optim),
        "images": config.rollout.num_images,
        "group_size": config.rollout.images_per_prompt,
        "best_and_worst": config.grpo.best_and_worst,
        "microbatch": config.rollout.images_at_once,
        "update_microbatch": config.grpo.images_at_once,
        "guidance_scale": config.rollout.guidance_scale,
        "latent": work.shape,
        "text_states": embeddings.shape[1:],
        "prediction_type": schedule.prediction_type,
        "schedule": {name: np.asarray(getattr(schedule, name)).tolist() for name in constants},
        "active": np.asarray(plan.active).tolist(),
        "steps": np.asarray(steps).tolist(),
        "clip": float(plan.clip_high),
        "beta": config.grpo.beta,
    }


def compare(
    work: Workload,
    record: dict[str, Any],
    *,
    command: Sequence[str],
    modes: Sequence[str],
    repeats: int,
    timeout: float,
    on_result: Callable[[dict[str, Any]], None],
) -> None:
    """Time iterations in turns, ours and the peer's, and add them to a record.

    Args:
        work: the iteration, warm.
        record: of `bench.measure`; gains `peers`, by mode: the seconds of every pair, and the
            ratios theirs/ours pair by pair with their median, by phase.
        command: that starts the peer.
        modes: of the peer.
        repeats: pairs for each mode.
        timeout: seconds that a peer may take in all.
        on_result: called with the record after every pair.
    """
    peers = record.setdefault("peers", {})
    work.iteration()
    for mode in modes:
        entry: dict[str, Any] = {"pairs": []}
        peers[mode] = entry
        deadline = time.monotonic() + timeout
        try:
            with Peer(command, peer_spec(work, mode), deadline) as peer:
                entry |= peer.ready()
                for _ in range(repeats):
                    ours = work.iteration()
                    theirs = peer.iteration()
                    entry["pairs"].append({"ours": ours, "theirs": theirs})
                    entry["ratios"] = _ratios(entry["pairs"])
                    on_result(record)
        except PeerError as error:
            entry["error"] = str(error)
        on_result(record)


def _ratios(pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return how many times as long theirs takes as ours, by phase."""
    ratios = {}
    for phase in COMPARED:
        ours, theirs = ([pair[side][phase] for pair in pairs] for side in ("ours", "theirs"))
        each = [b / a for a, b in zip(ours, theirs, strict=True)]
        ratios[phase] = {
            "ours": statistics.median(ours),
            "theirs": statistics.median(theirs),
            "pairs": each,
            "median": statistics.median(each),
        }
    return ratios
