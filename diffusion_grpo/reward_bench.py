"""What a round trip to the host costs a CLIP reward: the same scores both ways, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_grpo.clip_embedding import CLIPEmbedder
from diffusion_grpo.models.preprocess import ImageProcessorConfig, axis_lengths


@dataclass(frozen=True)
class RoundTrip:
    """Scoring images on the device, and by way of the host.

    Attributes:
        images: how many were scored at a time.
        device_seconds: median time with preprocessing on the device.
        host_seconds: median time when they are fetched, preprocessed by Pillow and sent back.
        difference: the largest difference of two scores, a cosine.
    """

    images: int
    device_seconds: float
    host_seconds: float
    difference: float


def clip_round_trip(
    embedder: CLIPEmbedder, images: jax.Array, prompts: list[str], *, repeats: int = 3
) -> RoundTrip:
    """Time the CLIP score of images both ways, after a first call each that compiles.

    Args:
        embedder: the CLIP model.
        images: uint8 device array [B, H, W, 3].
        prompts: B texts.
        repeats: timed calls each.
    """
    words = embedder.prompts(prompts)
    plain = CLIPEmbedder(
        embedder.model,
        embedder.tokenizer,
        embedder.processor,
        images_at_once=embedder.images_at_once,
        preprocess=lambda pixel_values, _: pixel_values,
    )

    def on_device() -> np.ndarray:
        found = embedder.images(images.astype(jnp.float32) / 255.0)
        return np.asarray(jnp.sum(found * words, axis=-1))

    def through_host() -> np.ndarray:
        prepared = [pillow_preprocess(image, embedder.processor) for image in np.asarray(images)]
        return np.asarray(jnp.sum(plain.images(jnp.asarray(np.stack(prepared))) * words, axis=-1))

    first, device_seconds = _timed(on_device, repeats)
    second, host_seconds = _timed(through_host, repeats)
    return RoundTrip(len(images), device_seconds, host_seconds, float(np.abs(first - second).max()))


def pillow_preprocess(image: np.ndarray, config: ImageProcessorConfig) -> np.ndarray:
    """Resize, crop and normalize one uint8 image [H, W, 3] with Pillow, as CLIP's processor does.

    Args:
        image: larger than the crop once it is resized.
        config: what to do; resizing, cropping, rescaling and normalizing are all done.

    Returns:
        float32 [h, w, 3].
    """
    rows, columns = axis_lengths(image.shape[0], image.shape[1], config)
    picture = Image.fromarray(image).resize((columns, rows), Image.Resampling(config.resample))
    height, width = config.crop_size
    left, top = (columns - width) // 2, (rows - height) // 2
    pixels = np.asarray(picture.crop((left, top, left + width, top + height)), np.float32)
    mean, std = (np.asarray(c, np.float32) for c in (config.image_mean, config.image_std))
    return (pixels * np.float32(config.rescale_factor) - mean) / std


def _timed(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    result, seconds = run(), []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)
