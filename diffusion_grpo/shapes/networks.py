"""The configurations of the embedded models, and the losses they are pretrained with.

The classes are the ones any checkpoint uses; only the numbers in these configurations are small.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.models.vae import VAEConfig
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.shapes.scenes import COLORS, IMAGE_SIZE, SHAPES, Scenes

SAMPLING = SamplingDefaults(guidance_scale=1.0, num_steps=20)  # as the demo trains it
TOKENS = 16
WIDTH = 96  # of CLIP's text tower, and so of the UNet's text embeddings
VISION_WIDTH = 128
# Wider than the towers: an image's embedding holds which of 40 kinds of objects are there and
# where, and a caption asks for some of it by an inner product.
PROJECTION = 256
PATCH = 8

VAE = VAEConfig(
    block_out_channels=(16, 32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=4,
    sample_size=IMAGE_SIZE,
    force_upcast=False,
)
UNET = UNetConfig(
    sample_size=IMAGE_SIZE // VAE.downscale_factor,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=4,
    cross_attention_dim=WIDTH,
)
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": True,
    "clip_sample": False,
}


def clip_config(vocabulary: int) -> Any:
    """Return the transformers configuration of the CLIP model, given its tokenizer's size."""
    from transformers import CLIPConfig

    def tower(width: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": width // 32,
            "projection_dim": PROJECTION,
        }

    special = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    return CLIPConfig(
        text_config=tower(WIDTH)
        | special
        | {
            "num_hidden_layers": 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": TOKENS,
            "pad_token_id": vocabulary - 1,
        },
        vision_config=tower(VISION_WIDTH)
        | {
            "num_hidden_layers": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
        projection_dim=PROJECTION,
    )


def position_table(scale: float = 0.3) -> np.ndarray:
    """Return sines and cosines of each patch's row and column; the class token's are 0.

    CLIP's own initialization (a normal of std 0.02) is an order below the patch embeddings, and a
    small model then learns colors but neither shapes nor places for a thousand steps.

    Args:
        scale: the amplitude.

    Returns:
        float32 `[1 + patches, VISION_WIDTH]`.
    """
    side, quarter = IMAGE_SIZE // PATCH, VISION_WIDTH // 4
    angles = np.arange(side)[:, None] * 10.0 ** (-1.0 * np.arange(quarter) / quarter)[None]
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    table = np.concatenate([rows, columns], axis=1)
    return scale * np.concatenate([np.zeros((1, VISION_WIDTH)), table]).astype(np.float32)


# ---------------------------------------------------------------------------------------------- VAE


def autoencoder_loss(
    model: Any, images: Float[Array, "B H W 3"], key: Array, *, kl_weight: float
) -> tuple[Array, dict[str, Array]]:
    """Reconstruction in pixels and in edges, plus a light pull of the latents to N(0, I).

    mean |x̂−x| + ½ mean |∇x̂−∇x| + kl_weight · mean KL(q(z|x) ‖ N(0, 1)), images in [−1, 1]; ∇ are
    differences of neighboring pixels, which keep edges sharp.
    """
    mean, logvar = model.encode(images)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = model.decode(z) - images
    pixel = jnp.abs(error).mean()
    edge = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1 - logvar).mean()
    return pixel + 0.5 * edge + kl_weight * kl, {"l1": pixel, "kl": kl}


# --------------------------------------------------------------------------------------------- CLIP


class Probes(nnx.Module):
    """Linear read-outs used while CLIP is trained, and then thrown away.

    From each patch token: the shape and color of the object it lies on. From the image embedding:
    for each color, each shape and each pair of both, whether it is there, and where. They make the
    embedding hold what and where linearly, which is what a caption's embedding must be able to ask
    for by an inner product.
    """

    def __init__(self, rngs: nnx.Rngs):
        """Build the read-outs."""
        kinds = len(SHAPES) + len(COLORS) + len(SHAPES) * len(COLORS)
        self.patch = nnx.Linear(VISION_WIDTH, len(SHAPES) + len(COLORS) + 2, rngs=rngs)
        self.scene = nnx.Linear(PROJECTION, 3 * kinds, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ProbeTargets:
    """What `Probes` should read: see `probe_targets`."""

    patch_shape: np.ndarray
    patch_color: np.ndarray
    presence: np.ndarray
    place: np.ndarray

    def tree(self) -> dict[str, np.ndarray]:
        """Return the arrays as a dict."""
        return dataclasses.asdict(self)


def probe_targets(scenes: Scenes) -> ProbeTargets:
    """Compute the read-outs' targets from the scenes.

    Returns:
        patch_shape, patch_color: class of each patch, int32 `[n, 64]`; 0 is background.
        presence: float32 `[n, K]` for K colors, shapes and pairs; 1 if present.
        place: float32 `[n, K, 2]`, mean center in [−1, 1], 0 where absent.
    """
    n = len(scenes)
    grid = (np.arange(IMAGE_SIZE // PATCH) + 0.5) * PATCH
    px, py = (a.ravel() for a in np.meshgrid(grid, grid))
    patch_shape = np.zeros((n, px.size), np.int32)
    patch_color = np.zeros((n, px.size), np.int32)
    kinds = len(COLORS) + len(SHAPES) + len(COLORS) * len(SHAPES)
    count = np.zeros((n, kinds), np.float32)
    place = np.zeros((n, kinds, 2), np.float32)
    rows = np.arange(n)
    for slot in range(scenes.shape.shape[1]):
        here = scenes.present[:, slot]
        x, y = scenes.x[:, slot], scenes.y[:, slot]
        near = np.hypot(px[None] - x[:, None], py[None] - y[:, None]) < scenes.radius[:, slot, None]
        on = near & here[:, None]
        shape, color = scenes.shape[:, slot].astype(int), scenes.color[:, slot].astype(int)
        patch_shape[on] = np.broadcast_to(shape[:, None] + 1, on.shape)[on]
        patch_color[on] = np.broadcast_to(color[:, None] + 1, on.shape)[on]
        center = np.stack([x, y], -1) / (IMAGE_SIZE / 2) - 1
        for index in (
            color,
            len(COLORS) + shape,
            len(COLORS) + len(SHAPES) + color * len(SHAPES) + shape,
        ):
            count[rows, index] += here
            place[rows, index] += np.where(here[:, None], center, 0)
    place /= np.maximum(count, 1)[..., None]
    return ProbeTargets(patch_shape, patch_color, (count > 0).astype(np.float32), place)


def _cross_entropy(logits: Array, labels: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]


def contrastive_loss(
    model: Any,
    probes: Probes,
    pixels: Float[Array, "B H W 3"],
    true_ids: Int[Array, "B n"],
    false_ids: Int[Array, "B k n"],
    targets: dict[str, Array],
    *,
    probe_weight: float,
) -> tuple[Array, dict[str, Array]]:
    """CLIP's symmetric loss with hard negatives, plus the probes' losses.

    An image is told from the captions of the others in the batch and from false captions of every
    image; its own false captions get a second loss of their own (which of these k+1 is mine?). A
    caption that stands in the batch twice is not a negative. Captions are compared by their tokens:
    one that says the same in other words (`a circle left of a square`, `a square right of a
    circle`), or that is true of another's image by chance, is trained as a false one.

    Source: Radford et al. 2021; hard negatives as Yuksekgonul et al. 2023.
    """
    b, k, n = false_ids.shape
    vision = model.vision_model(pixels)
    image = model.visual_projection(vision.pooled)
    ids = jnp.concatenate([true_ids, false_ids.reshape(b * k, n)])
    text = model.get_text_features(ids)
    image = image / jnp.linalg.norm(image, axis=-1, keepdims=True)
    text = text / jnp.linalg.norm(text, axis=-1, keepdims=True)
    scale = jnp.exp(jnp.clip(model.logit_scale[...], 0.0, np.log(100.0)))
    logits = scale * image @ text.T
    same = (true_ids[:, None] == ids[None]).all(-1) & ~jnp.eye(b, ids.shape[0], dtype=bool)
    logits = jnp.where(same, -1e9, logits)
    own = logits[:, b:].reshape(b, b, k)[jnp.arange(b), jnp.arange(b)]
    hard = jnp.concatenate([jnp.diagonal(logits)[:, None], own], axis=1)
    zeros = jnp.zeros((b,), jnp.int32)
    labels = jnp.arange(b)
    to_text = _cross_entropy(logits, labels).mean()
    to_image = _cross_entropy(logits[:, :b].T, labels).mean()
    hard_loss = _cross_entropy(hard, zeros).mean()

    patch = probes.patch(vision.last_hidden_state[:, 1:])
    shapes = len(SHAPES) + 1
    dense = (
        _cross_entropy(patch[..., :shapes], targets["patch_shape"]).mean()
        + _cross_entropy(patch[..., shapes:], targets["patch_color"]).mean()
    )
    scene = probes.scene(image * np.sqrt(PROJECTION)).reshape(b, -1, 3)
    present = targets["presence"]
    presence = optax.sigmoid_binary_cross_entropy(scene[..., 0], present).mean()
    error = jnp.square(scene[..., 1:] - targets["place"]).sum(-1)
    place = (error * present).sum() / present.sum()
    loss = (
        0.5 * (to_text + to_image) + hard_loss + probe_weight * (dense + 5 * presence + 2 * place)
    )
    accuracy = (hard.argmax(-1) == 0).mean()
    return loss, {"hard_accuracy": accuracy, "dense": dense, "presence": presence, "place": place}
