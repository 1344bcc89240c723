from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import (
    RewardError,
    RewardSet,
    combine,
    load_reward,
    on_device,
    parse_reward_specs,
    validate_scores,
    wrap_reward,
)

BRIGHTNESS = '''"""Brightness: the mean of all pixels, in [0, 1]."""

import numpy as np


def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3), dtype=np.float64) / 255
'''


def batch(count: int = 4, height: int = 16, width: int = 24) -> np.ndarray:
    shape = (count, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def rewards(**functions: Any) -> RewardSet:
    loaded = tuple(wrap_reward(function, name=name) for name, function in functions.items())
    return RewardSet(loaded, (1.0,) * len(loaded))


# --- What rewards see ---------------------------------------------------------------------------


def test_host_and_device_rewards_judge_the_same_8_bit_picture() -> None:
    seen = {}

    def host(images, prompts, metadata):
        seen["host"] = images
        return np.zeros(len(images))

    @on_device
    def device(images, prompts, metadata):
        seen["device"] = images
        return jnp.zeros(len(images))

    pixels = batch()
    both = rewards(host=host, device=device)
    exact = pixels.astype(np.float32) / np.float32(255)
    noisy = exact + np.float32(0.3 / 255) * np.sign(exact - 0.5)  # rounds back, and leaves [0, 1]
    for images in (pixels, jnp.asarray(pixels), exact, noisy, jnp.asarray(noisy)):
        both(images, ["a"] * 4)
        assert isinstance(seen["host"], np.ndarray) and seen["host"].dtype == np.uint8
        np.testing.assert_array_equal(seen["host"], pixels)
        assert isinstance(seen["device"], jax.Array) and seen["device"].dtype == np.float32
        # XLA divides by a constant as it multiplies by its reciprocal.
        np.testing.assert_array_max_ulp(np.asarray(seen["device"]), exact, maxulp=1)


def test_prompts_and_metadata_arrive_in_order_and_batches_are_cut_to_size() -> None:
    calls = []

    def reward(images, prompts, metadata):
        calls.append((len(images), prompts, metadata))
        return images[:, 0, 0, 0]

    reward.batch_size = 2  # pyright: ignore[reportFunctionMemberAccess]
    images = batch(5)
    details = [{"index": index} for index in range(5)]
    result = rewards(reward=reward)(images, list("abcde"), details)
    assert calls == [
        (2, ["a", "b"], details[:2]),
        (2, ["c", "d"], details[2:4]),
        (1, ["e"], details[4:]),
    ]
    np.testing.assert_array_equal(result.scores["reward"], images[:, 0, 0, 0])


def test_metadata_is_each_images_own_down_to_its_lists() -> None:
    def matched(images, prompts, metadata):
        return [
            len(item["objects"]) - len([item["objects"].pop() for _ in "ab"]) for item in metadata
        ]

    details = [{"objects": [1, 2, 3]}] * 4  # as of a group: one dictionary, G times
    judges = rewards(matched=matched)
    for _ in range(2):
        assert judges(batch(), ["a"] * 4, details).total.tolist() == [1, 1, 1, 1]
    assert details[0] == {"objects": [1, 2, 3]}


def test_a_reward_that_works_in_place_does_not_change_what_the_next_one_sees() -> None:
    def spoil(images, prompts, metadata):
        images[:] = 0
        prompts.clear()
        for item in metadata:
            item.clear()
        return np.zeros(len(images))

    def check(images, prompts, metadata):
        assert prompts == ["a"] * 4 and metadata == [{"k": 1}] * 4
        return images.mean(axis=(1, 2, 3))

    images = batch()
    for given in (images.copy(), jnp.asarray(images)):
        result = rewards(spoil=spoil, check=check)(given, ["a"] * 4, [{"k": 1}] * 4)
        assert (result.scores["check"] > 0).all()


def test_the_total_is_the_weighted_sum() -> None:
    scores = {
        "a": np.array([1, 2], np.float32),
        "b": np.array([10, -10], np.float32),
        "c": np.array([0, 4], np.float32),
    }
    total = combine(scores, {"b": -0.5, "a": 1.0, "c": 0.25})
    np.testing.assert_array_equal(total, np.array([-4, 8], np.float32))
    with pytest.raises(ValueError, match="weights of"):
        combine(scores, {"a": 1.0})


def test_a_reward_set_loads_what_was_parsed(tmp_path) -> None:
    path = write(tmp_path / "brightness.py", BRIGHTNESS)
    specs = parse_reward_specs((f"{path}=10", "jpeg_size=0.5"), ("jpeg_size.quality=50",))
    result = RewardSet.load(specs)(batch(), ["a"] * 4)
    assert list(result.scores) == ["brightness", "jpeg_size"] == list(result.seconds)
    expected = 10 * result.scores["brightness"] + 0.5 * result.scores["jpeg_size"]
    np.testing.assert_allclose(result.total, expected, rtol=1e-6)
    named = write(tmp_path / "named.py", BRIGHTNESS + "brightness.name = 'jpeg_size'\n")
    with pytest.raises(UsageError, match="two rewards have the name 'jpeg_size'"):
        RewardSet.load(parse_reward_specs((f"{named}:brightness", "jpeg_size")))


def test_images_that_cannot_be_scored_are_refused() -> None:
    ones = rewards(ones=lambda images, prompts, metadata: np.ones(len(images)))
    with pytest.raises(ValueError, match=r"shape \(16, 24, 3\), expected \[B, H, W, 3\]"):
        ones(batch()[0], ["a"])
    with pytest.raises(ValueError, match="4 images and 3 prompts"):
        ones(batch(), ["a"] * 3, [{}] * 3)
    with pytest.raises(ValueError, match="4 prompts and 3 metadata"):
        ones(batch(), ["a"] * 4, [{}] * 3)
    with pytest.raises(ValueError, match="dtype int32, expected"):
        ones(jnp.asarray(batch(), jnp.int32), ["a"] * 4)
    diverged = np.zeros((4, 8, 8, 3), np.float32)
    diverged[2, 0, 0, 0] = np.nan
    for images in (diverged, jnp.asarray(diverged)):
        with pytest.raises(ValueError, match="image 2 holds NaN or infinity"):
            ones(images, ["a"] * 4)


# --- What rewards return ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2.5, -3],
        np.array([1, 2.5, -3], np.float64),
        np.array([1, 2.5, -3], np.float16),
        jnp.array([1, 2.5, -3], jnp.bfloat16),
        [np.float32(1), jnp.float32(2.5), -3],
    ],
)
def test_numbers_of_any_library_become_float32(returned) -> None:
    scores = validate_scores("r", returned, 3)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1, 2.5, -3])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "'r' returned None, expected float32 of shape .3,.*is a return missing"),
        (np.zeros((3, 1)), r"returned shape \(3, 1\).*squeeze its last axis"),
        (1.0, r"returned shape \(\), expected float32 of shape \(3,\)"),
        ([1.0], "returned 1 scores for 3 images: image 21 is the first without one"),
        ([1.0] * 4, "returned 4 scores for 3 images: score 23 is the first without an image"),
        ([1.0, None, 2.0], "returned None .object. for image 21, not a number"),
        (["0.5", "1", "2"], "for image 20, not a number"),
        (np.zeros(3, complex), "for image 20, not a number"),
        ([[1.0], [1.0, 2.0], 3.0], "returned list, which is not an array"),
        ([1.0, 2.0, np.nan], "returned nan for image 22 .1 of 3 scores are not finite"),
        ([1.0, -np.inf, np.nan], "returned -inf for image 21 .2 of 3"),
        ([1e300, 0.0, 0.0], r"returned 1e\+300 for image 20 .*not finite in float32"),
    ],
)
def test_what_is_not_one_finite_number_an_image_is_an_error(returned, message) -> None:
    with pytest.raises(RewardError, match=message):
        validate_scores("r", returned, 3, indices=range(20, 23))


def test_the_first_bad_index_counts_over_all_batches() -> None:
    def reward(images, prompts, metadata):
        return [np.nan if prompt == "bad" else 0.0 for prompt in prompts]

    reward.batch_size = 2  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(RewardError, match="reward 'mine' returned nan for image 3"):
        rewards(mine=reward)(batch(), ["a", "b", "c", "bad"])


def test_a_reward_that_raises_is_named_with_the_line_of_its_file(tmp_path) -> None:
    code = "def fails(images, prompts, metadata):\n    import json\n    return json.loads('{')\n"
    reward = load_reward(write(tmp_path / "fails.py", code))
    with pytest.raises(
        RewardError, match=r"reward 'fails' failed: JSONDecodeError: .*fails\.py, line 3\)"
    ):
        RewardSet((reward,), (1.0,))(batch(), ["a"] * 4)
