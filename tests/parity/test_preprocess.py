"""CLIP's image preprocessing against Transformers' processor and Pillow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.preprocess import (
    ImageProcessorConfig,
    clip_preprocess,
    resize_matrix,
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth uint8 image [H, W, 3] of waves, with a hard-edged disc and bar."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    image = np.zeros((height, width, 3))
    for _ in range(8):
        fy, fx, phase = rng.uniform(-12, 12), rng.uniform(-12, 12), rng.uniform(0, 6.28)
        image += np.sin(6.28 * (fy * y + fx * x) + phase)[..., None] * rng.uniform(0, 0.2, 3)
    image = 0.5 + image
    image[(y - 0.3) ** 2 + (x - 0.4) ** 2 < 0.03] = (1.0, 0.1, 0.0)
    image[(x > 0.6) & (x < 0.7)] = (0.0, 0.0, 1.0)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def ours(images: np.ndarray, settings: dict) -> np.ndarray:
    config = ImageProcessorConfig.from_dict(settings)
    scaled = jnp.asarray(images, jnp.float32) / 255
    return np.asarray(jax.jit(clip_preprocess, static_argnums=1)(scaled, config))


def theirs(images: np.ndarray, settings: dict) -> np.ndarray:
    processor = CLIPImageProcessorPil(**settings)
    pixel_values = processor(list(images), return_tensors="np")["pixel_values"]
    return np.asarray(pixel_values).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(
    "shape", [(512, 512), (64, 64), (37, 53), (300, 211), (129, 400), (56, 90), (512, 56)]
)
def test_pixels_agree_with_the_processor(shape, resample):
    images = np.stack([photograph(*shape, seed=i) for i in range(2)])
    settings = dict(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        resample=resample,
        do_normalize=False,
    )
    difference = np.abs(ours(images, settings) - theirs(images, settings))
    assert difference.max() <= 2.001 / 255
    # Only sums halfway between two pixel values, frequent at a ratio of 8:7, may round otherwise.
    assert (difference > 0.5 / 255).mean() < 5e-2


def test_clips_own_settings_agree_with_the_processor():
    images = photograph(320, 256)[None]
    difference = np.abs(ours(images, {}) - theirs(images, {}))
    assert difference.max() <= 2 / 255 / min(ImageProcessorConfig().image_std)
    assert difference.mean() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"height": 40, "width": 70}, crop_size={"height": 31, "width": 44}),
        dict(size=40, crop_size=33),
        dict(size=40, do_center_crop=False),
        dict(do_resize=False, crop_size={"height": 75, "width": 101}),
        dict(do_resize=False, crop_size={"height": 31, "width": 120}),
        dict(size=40, crop_size=40, do_rescale=False, do_normalize=False),
        dict(size=40, crop_size=40, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.125]),
    ],
    ids=str,
)
def test_every_option_agrees_with_the_processor(settings):
    images = photograph(60, 90)[None]
    expected = theirs(images, settings)
    actual = ours(images, settings)
    assert actual.shape == expected.shape
    unit = 1.0 if settings.get("do_rescale") is False else 1 / 255 / 0.125
    np.testing.assert_allclose(actual, expected, atol=2 * unit)
    assert np.abs(actual - expected).mean() < 2e-3 * unit


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(("length", "resized"), [(17, 40), (40, 17), (64, 224), (512, 224), (9, 9)])
def test_resize_matrix_is_pillows_float_resampling(length, resized, resample):
    # On float images Pillow does not round, so each unit impulse gives one column of its weights.
    impulses = np.eye(length, dtype=np.float32)
    resized_image = Image.fromarray(impulses).resize((resized, length), resample)
    expected = np.asarray(resized_image).T
    np.testing.assert_allclose(resize_matrix(length, resized, resample), expected, atol=1e-6)


def test_gradient_is_that_of_the_linear_resize():
    config = ImageProcessorConfig(size=8, crop_size=(8, 8), do_normalize=False)
    image = jnp.asarray(photograph(20, 20)[None], jnp.float32) / 255 * 0.5 + 0.25
    gradient = jax.grad(lambda x: clip_preprocess(x, config).sum())(image)
    column = resize_matrix(20, 8, 3).sum(axis=0)
    expected = column[:, None] * column[None, :]
    np.testing.assert_allclose(gradient[0, :, :, 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (dict(resample=0), "resample = 0"),
        (dict(resample="bicubic"), "resample = 'bicubic'"),
        (dict(size={"shortest_edge": 2, "longest_edge": 3}), "longest_edge"),
        (dict(size=0), "size = 0"),
        (dict(crop_size=[3, 3]), "crop_size"),
        (dict(do_resize="yes"), "do_resize"),
        (dict(image_mean=[0.5]), "image_mean"),
        (dict(image_std=[1, 0, 1]), "image_std"),
        (dict(do_pad=True), "do_pad"),
        (dict(do_resise=True), "did you mean 'do_resize'"),
        (dict(image_processor_type="SiglipImageProcessor"), "SiglipImageProcessor"),
    ],
    ids=str,
)
def test_unsupported_settings_are_named(settings, named):
    with pytest.raises(UsageError, match=named):
        ImageProcessorConfig.from_dict(settings)


def test_old_and_new_spelling_are_the_same():
    old = dict(size=224, crop_size=224, resample=3, feature_extractor_type="CLIPFeatureExtractor")
    assert ImageProcessorConfig.from_dict(old) == ImageProcessorConfig()
    assert (
        ImageProcessorConfig.from_dict(CLIPImageProcessorPil().to_dict()) == ImageProcessorConfig()
    )
