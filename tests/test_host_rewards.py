"""The rewards that are formulas of pixels, against SciPy, PyTorch and values known by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import RewardSet, load_reward


def batch(count: int = 4, height: int = 16, width: int = 24) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def flat(*colors: tuple[int, int, int], size: int = 8) -> np.ndarray:
    return np.broadcast_to(
        np.array(colors, np.uint8)[:, None, None], (len(colors), size, size, 3)
    ).copy()


def score(name: str, images: np.ndarray, **options: str) -> np.ndarray:
    reward = RewardSet((load_reward(name, options),), (1.0,))
    return reward(images, [""] * len(images)).total


def test_sharpness_is_the_variance_of_scipys_laplacian() -> None:
    images = batch()
    expected = []
    for image in images:
        red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
        luma = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
        expected.append(ndimage.laplace(luma)[1:-1, 1:-1].var())
    np.testing.assert_allclose(score("sharpness", images), expected, rtol=1e-5)


def test_sharpness_runs_from_a_ramp_to_a_checkerboard() -> None:
    checkerboard = np.indices((8, 8)).sum(axis=0) % 2 * 255
    ramp = np.broadcast_to(np.arange(8) * 30, (8, 8))
    images = np.stack([checkerboard, ramp]).astype(np.uint8)[..., None].repeat(3, -1)
    np.testing.assert_allclose(score("sharpness", images), [16.0, 0.0], atol=1e-6)
    with pytest.raises(Exception, match="images of 2x5 pixels; expected 3x3 or more"):
        score("sharpness", batch(1, 2, 5))


def test_colorfulness_is_hasler_and_suesstrunks_third_metric() -> None:
    images = batch()
    channels = torch.tensor(images).double().permute(3, 0, 1, 2).flatten(2)
    rg, yb = channels[0] - channels[1], 0.5 * (channels[0] + channels[1]) - channels[2]
    spread = torch.sqrt(rg.var(1, correction=0) + yb.var(1, correction=0))
    expected = spread + 0.3 * torch.sqrt(rg.mean(1) ** 2 + yb.mean(1) ** 2)
    np.testing.assert_allclose(score("colorfulness", images), expected, rtol=1e-5)
    # Gray has none; of one flat color only the means are left: pure red, 0.3 √(255² + 127.5²).
    known = score("colorfulness", flat((90, 90, 90), (255, 0, 0)))
    np.testing.assert_allclose(known, [0.0, 0.3 * np.hypot(255, 127.5)], rtol=1e-6)


def test_brightness_is_the_mean_luma() -> None:
    colors = flat((0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255))
    np.testing.assert_allclose(
        score("brightness", colors), [0, 1, 0.2126, 0.7152, 0.0722], rtol=1e-6
    )
    half = flat((255, 255, 255))
    half[:, :4] = 0
    np.testing.assert_allclose(score("brightness", half), [0.5], rtol=1e-6)


@pytest.mark.parametrize(("quality", "sign"), [(95, -1), (30, 1)])
def test_jpeg_size_is_the_size_of_the_file_that_pillow_writes(tmp_path, quality, sign) -> None:
    name = {-1: "compressible", 1: "incompressible"}[sign]
    images = np.concatenate([batch(3, 64, 64), np.full((1, 64, 64, 3), 200, np.uint8)])
    scores = score("jpeg_size", images, quality=str(quality), sign=name)
    for index, image in enumerate(images):
        path = tmp_path / f"{index}.jpg"
        Image.fromarray(image, "RGB").save(path, quality=quality)
        assert scores[index] == np.float32(sign * path.stat().st_size / 1000)
    assert (scores[3] > scores[:3]).all() == (sign == -1)


def test_jpeg_size_defaults_to_ddpos_compressibility_and_checks_its_options() -> None:
    image = batch(1, 64, 64)
    encoded = io.BytesIO()
    Image.fromarray(image[0]).save(encoded, "JPEG", quality=95)
    found = load_reward("jpeg_size").function(image, [""], [{}])
    np.testing.assert_array_equal(found, np.array([-len(encoded.getvalue()) / 1000], np.float32))
    with pytest.raises(UsageError, match="quality is 101; expected 1 to 100"):
        load_reward("jpeg_size", {"quality": "101"})
    with pytest.raises(UsageError, match="did you mean 'compressible'"):
        load_reward("jpeg_size", {"sign": "compresible"})
