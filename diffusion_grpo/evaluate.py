"""Held-out prompts at fixed seeds.

The images have the same prompts and the same noise before, during and after training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from diffusion_grpo import processes
from diffusion_grpo.conditioning import by_rows_of, encode_prompts
from diffusion_grpo.config import Config, PromptsConfig
from diffusion_grpo.divided_scoring import DividedScoring, start_scoring
from diffusion_grpo.gaussian import Reduction, gaussian_kl
from diffusion_grpo.interrupt import do_nothing
from diffusion_grpo.lanes import Lanes
from diffusion_grpo.mesh import by_rows, own_rows, resident, to_host
from diffusion_grpo.pipeline import (
    PolicyStructure,
    TrainablePolicy,
    latent_shape,
    make_decoder,
    make_sampler,
    padded_chunks,
)
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.program_cache import network_jit, shared_programs
from diffusion_grpo.prompts import Prompt, evaluated_on
from diffusion_grpo.reward import RewardSet, Scoring
from diffusion_grpo.rollout import denoising_step, image_keys, initial_noise, step_noise
from diffusion_grpo.schedule import Schedule, make_schedule
from diffusion_grpo.stats import by_prompt, diversity, monitor, standard_error


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What the model drew for the held-out prompts, and how it was scored.

    Attributes:
        images: uint8 `[N, H, W, 3]`, prompt by prompt.
        prompts: N texts.
        scores: reward name → float32 `[N]`: those trained on, then the gold ones.
        total: float32 `[N]`, the weighted sum that training maximizes.
        trained_on: how many of the scores, from the first, are summed in the total.
        images_per_prompt: images of each prompt, which follow each other.
        tasks: N tasks, where every prompt's metadata have one.
        kl: KL to the reference along stochastic trajectories, a mean over images, if measured.
        gold: name → weight of those of the scores that are not trained on.
        lower: names of the scores of which less is better: their weight is below 0.
    """

    images: np.ndarray
    prompts: list[str]
    scores: dict[str, np.ndarray]
    total: np.ndarray
    trained_on: int = 1
    images_per_prompt: int = 1
    tasks: list[str] | None = None
    kl: float | None = None
    gold: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lower: tuple[str, ...] = ()

    @property
    def groups(self) -> np.ndarray:
        """The prompt of each image, `[N]`, counted from 0."""
        return np.arange(len(self.images)) // self.images_per_prompt

    def error(self, values: np.ndarray) -> float:
        """Return the standard error of the mean of N numbers, one an image; over prompts."""
        return standard_error(by_prompt(values, self.groups))

    @property
    def reported(self) -> dict[str, np.ndarray]:
        """What is told to people: the scores, led by `total` where it sums several of them."""
        return ({"total": self.total} if self.trained_on > 1 else {}) | self.scores

    def metrics(self) -> dict[str, float]:
        """Return the means of the rewards, and what `stats` measures of the pictures."""
        measured = {
            "reward/mean": float(self.total.mean()),
            "reward/standard_error": self.error(self.total),
        } | {f"reward/{name}/mean": float(values.mean()) for name, values in self.scores.items()}
        measured |= {name: float(values.mean()) for name, values in monitor(self.images).items()}
        if self.images_per_prompt > 1:
            measured["diversity"] = float(diversity(self.images, self.groups).mean())
        return measured | ({} if self.kl is None else {"kl": self.kl})


def describe_list(prompts: PromptsConfig, count: int) -> str:
    """Return what an evaluation draws: how many images, and of which prompts."""
    if evaluated_on(prompts.heldout, prompts.heldout_share) == "training":
        return f"{count} images of the training prompts {prompts.train!r}"
    if prompts.heldout is None:
        return f"{count} images of prompts held out of {prompts.train!r}"
    return f"{count} images of the held-out prompts {prompts.heldout!r}"


class Evaluator:
    """Everything an evaluation needs but the trained parameters, prepared once a run.

    Attributes:
        check: called once for every chunk of images, and may raise to stop; does nothing at first.
    """

    def __init__(
        self,
        config: Config,
        model: StableDiffusion,
        policy: TrainablePolicy,
        prompts: Sequence[Prompt],
        rewards: RewardSet,
        gold: RewardSet | None,
    ):
        """Encode the prompts and draw their initial noise.

        Args:
            config: the run's.
            model: the pipeline.
            policy: the split UNet.
            prompts: held-out prompts; the first `eval.num_prompts` are used.
            rewards: what is trained on.
            gold: what is not; measured only.
        """
        options, rollout = config.eval, config.rollout
        chosen = list(enumerate(prompts[: options.num_prompts]))
        repeated = [(i, p, g) for i, p in chosen for g in range(options.images_per_prompt)]
        self.texts = [p.text for _, p, _ in repeated]
        self.metadata = [p.metadata for _, p, _ in repeated]
        self.description = describe_list(config.prompts, len(self.texts))
        self._rewards, self._gold = rewards, gold
        self._images_per_prompt = options.images_per_prompt
        self._policy = policy
        self._schedule = make_schedule(model.scheduler_config, options.num_steps, eta=options.eta)
        shape = latent_shape(model, rollout.height, rollout.width)
        self._conditioning = encode_prompts(
            model,
            self.texts,
            negative_prompt=rollout.negative_prompt,
            shape=shape,
            clip_skip=config.model.clip_skip,
            tokens=policy.reads_tokens,
        )
        index = np.array([i for i, _, _ in repeated]), np.array([g for _, _, g in repeated])
        self._initial = initial_noise(
            image_keys(options.seed, 0, *index, "evaluation_initial"), shape
        )
        self._keys = image_keys(options.seed, 0, *index, "evaluation_step")
        self._draw, self._lanes = make_sampler(policy.structure), Lanes()
        self._decode = make_decoder(model)
        self._chunk = rollout.images_at_once
        known = all("task" in metadata for metadata in self.metadata)
        self._tasks = [str(metadata["task"]) for metadata in self.metadata] if known else None
        self.check: Callable[[], None] = do_nothing
        self._kl = None
        if options.stochastic:
            schedule = make_schedule(model.scheduler_config, rollout.num_steps, eta=rollout.eta)
            self._kl = make_trajectory_kl(policy, schedule, config.grpo.log_prob_reduction)

    def __call__(self, trained: Any) -> Evaluation:
        """Draw and score with the given trained parameters.

        Raises:
            RewardError: a reward failed; an evaluation drops no group.
        """
        division = divide_rows(len(self.texts), self._images_per_prompt, self._chunk)
        own, left = division.own, division.own.stop - division.own.start
        drawn, judges = [], [self._rewards, *([self._gold] if self._gold else [])]
        with contextlib.ExitStack() as stack:
            scorings = [stack.enter_context(self._start(judge, own)) for judge in judges]
            for part in self._drawn(trained, division.chunks):
                self.check()
                drawn.append(part)
                for scoring in scorings if left else ():
                    scoring.add(part[:left])
                left -= min(left, len(part))
            results = [scoring.result() for scoring in scorings]
        result = results[0]
        scores = {name: values for found in results for name, values in found.scores.items()}
        images = processes.gather_rows(np.concatenate(drawn), "the images of the evaluation")
        return Evaluation(
            images[division.places],
            self.texts,
            scores,
            result.total,
            trained_on=len(result.scores),
            images_per_prompt=self._images_per_prompt,
            tasks=self._tasks,
            kl=self._measure_kl(trained, division.chunks),
            gold=self._gold.weight_of if self._gold else {},
            lower=tuple(
                name for judge in judges for name, weight in judge.weight_of.items() if weight < 0
            ),
        )

    def _start(self, rewards: RewardSet, own: slice) -> Scoring | DividedScoring:
        each = self._images_per_prompt
        return start_scoring(rewards, self.texts[own], self.metadata[own], group_size=each)

    def _drawn(self, trained: Any, chunks: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """Draw the images, chunk by chunk of one size; yields those of this process."""

        def draw(rows: np.ndarray) -> Any:
            beginnings = by_rows(self._initial[rows]), by_rows(self._keys[rows])
            conditioning = by_rows_of(self._conditioning, rows)
            with resident():
                final = self._draw(
                    trained, self._policy.frozen, self._schedule, *beginnings, conditioning
                )
            return self._decode(final)

        for images in self._lanes.run([partial(draw, rows) for rows in chunks]):
            yield np.asarray(own_rows(images))

    def _measure_kl(self, trained: Any, chunks: Sequence[np.ndarray]) -> float | None:
        if self._kl is None:
            return None
        each = np.zeros(len(self.texts), np.float32)
        for rows in chunks:
            self.check()
            each[rows] = to_host(
                self._kl(
                    trained,
                    by_rows(self._initial[rows]),
                    by_rows(self._keys[rows]),
                    by_rows_of(self._conditioning, rows),
                )
            )
        return float(each.mean())


class Division(NamedTuple):
    """Who draws which images of an evaluation.

    Attributes:
        chunks: the images of each chunk, divided over the devices in this order.
        own: which images are this process's: whole groups.
        places: where each image is among those that the processes drew, joined in their order.
    """

    chunks: list[np.ndarray]
    own: slice
    places: np.ndarray


def divide_rows(count: int, group: int, size: int) -> Division:
    """Divide images over the processes, whole groups to each, in chunks of one size.

    As `padded_chunks` in a single process; in several, a process draws its last image again where
    it has fewer than another.

    Args:
        count: images, prompt by prompt.
        group: images of a prompt.
        size: images at a time, of all processes.
    """
    number, rank = processes.count(), processes.rank()
    ends = [count // group * process // number * group for process in range(number + 1)]
    size = len(padded_chunks(count, size)[0])
    each = size // number
    longest = max(np.diff(ends))
    length = -(-longest // each) * each
    rows = np.stack(
        [
            (start + np.arange(length)).clip(max=max(stop - 1, 0))
            for start, stop in zip(ends[:-1], ends[1:], strict=True)
        ]
    )
    chunks = rows.reshape(number, -1, each).swapaxes(0, 1).reshape(-1, size)
    places = [
        process * length + np.arange(ends[process + 1] - ends[process]) for process in range(number)
    ]
    own = slice(ends[rank], ends[rank + 1])
    return Division(list(chunks), own, np.concatenate(places))


def make_trajectory_kl(
    policy: TrainablePolicy,
    schedule: Schedule,
    reduction: Reduction,
    reference: TrainablePolicy | None = None,
) -> Callable[..., Array]:
    """Compile the KL of a policy to its reference along the policy's own stochastic trajectories.

    Σ_t ‖μ_θ − μ_ref‖²/(2σ_t²) at the latents that π_θ visits (with a learned noise scale the KL of
    two Gaussians of different σ; see `gaussian_kl`). With `sum` an unbiased estimate, one
    trajectory an image, of the KL of the two distributions over trajectories; with `mean` that
    divided by the elements of a latent.

    Args:
        policy: the split UNet.
        schedule: of the stochastic sampler.
        reduction: over the latent's elements, as in the log-prob.
        reference: another UNet; without one, the policy's own initial trained parameters.

    Returns:
        (trained, initial, keys, conditioning, reference_conditioning) → float32 [B], nats (an
        element with `mean`); without the last one the reference is conditioned like the policy.
    """
    other = reference or policy
    divergence = _divergence(policy.structure, other.structure, reduction)
    frozen, fixed = policy.frozen, (other.trained, other.frozen)

    def measure(
        trained: Any,
        initial: Array,
        keys: Array,
        conditioning: Any,
        reference_conditioning: Any = None,
    ) -> Array:
        if reference_conditioning is None:
            reference_conditioning = conditioning
        arguments = initial, keys, conditioning, reference_conditioning
        return divergence(trained, frozen, fixed, schedule, *arguments)

    return measure


@shared_programs
def _divergence(
    policy: PolicyStructure, reference: PolicyStructure, reduction: Reduction
) -> Callable[..., Array]:
    @network_jit
    def divergence(
        trained: Any,
        frozen: Any,
        fixed: Any,
        schedule: Schedule,
        initial: Array,
        keys: Array,
        conditioning: Any,
        reference_conditioning: Any,
    ) -> Array:
        noisy = policy.noise(trained, schedule)

        def step(x_t: Array, i: Array) -> tuple[Array, Array]:
            mean, std = denoising_step(
                policy.denoiser(trained, frozen), noisy, i, x_t, conditioning
            )
            mean_ref, std_ref = denoising_step(
                reference.denoiser(*fixed), schedule, i, x_t, reference_conditioning
            )
            x_s = mean + std * step_noise(keys, i, x_t.shape[1:])
            std_q = std_ref if policy.learns_noise else None
            return x_s, gaussian_kl(mean, mean_ref, std, reduction=reduction, std_q=std_q)

        return jax.lax.scan(step, initial, jnp.arange(schedule.num_steps))[1].sum(axis=0)

    return divergence
