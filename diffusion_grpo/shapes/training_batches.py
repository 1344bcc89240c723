"""What the embedded models are pretrained on, step by step: scenes, captions, latents, timesteps.

A batch is a function of the seed and the step, so that an interrupted training goes on alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_grpo.shapes import networks
from diffusion_grpo.shapes.captions import captions, hard_negatives
from diffusion_grpo.shapes.render import render
from diffusion_grpo.shapes.scenes import COLORS, RELATIONS, scene_batch

VOCABULARY_SEED = 7919  # keeps the draws of captions apart from those of scenes


def tokenize(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Return int32 ids `[n, TOKENS]`, padded to the model's length."""
    out = tokenizer(texts, padding="max_length", max_length=networks.TOKENS, truncation=True)
    return np.asarray(out["input_ids"], np.int32)


@dataclasses.dataclass(frozen=True)
class ClipBatches:
    """Step → a batch of CLIP's training: pictures, true and false captions, what probes read."""

    tokenizer: Any
    seed: int
    batch: int
    negatives: int

    def __call__(self, step: int) -> dict[str, Any]:
        """Draw the scenes of a step and make its batch."""
        scenes = scene_batch(self.seed, step, self.batch)
        rng = np.random.default_rng([self.seed, step, VOCABULARY_SEED])
        false = [
            c for row in hard_negatives(scenes, rng, self.negatives, split="train") for c in row
        ]
        false_ids = tokenize(self.tokenizer, false)
        return {
            "images": render(scenes),
            "true_ids": tokenize(self.tokenizer, captions(scenes, rng)),
            "false_ids": false_ids.reshape(self.batch, self.negatives, -1),
            "targets": networks.probe_targets(scenes).tree(),
        }


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Step → pictures and captions of `batch` scenes."""

    seed: int
    batch: int

    def __call__(self, step: int) -> tuple[np.ndarray, list[str]]:
        """Draw and render the scenes of a step."""
        scenes = scene_batch(self.seed, step, self.batch)
        rng = np.random.default_rng([self.seed, step, VOCABULARY_SEED])
        return render(scenes), captions(scenes, rng)


@dataclasses.dataclass(frozen=True)
class UNetBatches:
    """Step → latents and token ids of a batch, a tenth of them without their caption.

    Attributes:
        latents: float16 `[n, h, w, c]`, unscaled.
        ids: int32 `[n, TOKENS]`.
        placed: indices of the scenes whose captions state a place.
        paired: indices of those whose captions name two objects and no color.
        empty: the ids of no caption.
        seed: with the step, decides the batch.
        batch: scenes a step.
        place_share: share of a batch that is drawn from `placed`.
        pair_share: share that is drawn from `paired`; the rest from all.
    """

    latents: np.ndarray
    ids: np.ndarray
    placed: np.ndarray
    paired: np.ndarray
    empty: np.ndarray
    seed: int
    batch: int
    place_share: float
    pair_share: float

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Draw the batch of a step."""
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(0, len(self.latents), self.batch)
        unconditional = rng.random(self.batch) < 0.1
        chosen = self.placed[rng.integers(0, len(self.placed), self.batch)]
        draw = rng.random(self.batch)
        rows = np.where(draw < self.place_share, chosen, rows)
        chosen = self.paired[rng.integers(0, len(self.paired), self.batch)]
        pair = (self.place_share <= draw) & (draw < self.place_share + self.pair_share)
        rows = np.where(pair, chosen, rows)
        ids = np.where(unconditional[:, None], self.empty[None], self.ids[rows])
        return {"latents": self.latents[rows], "ids": ids}


def draw_timesteps(key: jax.Array, n: int, early_share: float) -> jax.Array:
    """Draw the timesteps of a batch.

    Logit-normal (scale 1.1), where most is learned of what things look like; but `early_share` of
    them uniform in the noisiest three tenths, where a sampler begins and decides what is where.

    Returns:
        int32 `[n]` in [0, 1000).
    """
    middle_key, early_key, choice_key = jax.random.split(key, 3)
    middle = 1000 * jax.nn.sigmoid(1.1 * jax.random.normal(middle_key, (n,)))
    early = jax.random.randint(early_key, (n,), 700, 1000)
    chosen = jax.random.uniform(choice_key, (n,)) < early_share
    return jnp.where(chosen, early, middle.astype(jnp.int32).clip(0, 999))


def states_a_place(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Say which captions, int32 `[n, TOKENS]`, state a place: bool `[n]`."""
    return _has_word(tokenizer, ids, RELATIONS)


def names_a_plain_pair(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Say which captions, int32 `[n, TOKENS]`, name two objects and no color: bool `[n]`."""
    return _has_word(tokenizer, ids, ["and"]) & ~_has_word(tokenizer, ids, COLORS)


def _has_word(tokenizer: Any, ids: np.ndarray, words: Sequence[str]) -> np.ndarray:
    first = tokenize(tokenizer, list(words))[:, 1]  # after the token that begins a text
    return np.asarray(np.isin(ids, first).any(axis=1))
