import io

import numpy as np
import pytest
from PIL import Image
from scipy import stats as scipy_stats

from diffusion_grpo.stats import bootstrap_mean, by_prompt, diversity, monitor, win_rate


@pytest.mark.parametrize("count", [2, 7, 200])
def test_bootstrap_interval_is_that_of_scipy_on_the_same_numbers(count):
    values = np.random.default_rng(1).gamma(2.0, size=count)
    ours = bootstrap_mean(values, seed=5, resamples=4000)
    theirs = scipy_stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.value == values.mean()
    # the same draws: the two differ by rounding alone
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=1e-12)


def test_bootstrap_in_blocks_still_covers_the_mean():
    values = np.random.default_rng(0).normal(3.0, 1.0, 30_000)  # 2 000 000 / 30 000 = 66 a block
    interval = bootstrap_mean(values, resamples=500)
    error = 1.96 / np.sqrt(30_000)
    assert abs(interval.high - values.mean() - error) < 0.3 * error
    assert abs(values.mean() - interval.low - error) < 0.3 * error


def test_a_single_value_has_no_interval():
    assert bootstrap_mean(np.array([2.0])).value == 2.0
    assert np.isnan(bootstrap_mean(np.array([2.0])).low)


@pytest.mark.parametrize(("wins", "count"), [(0, 10), (7, 10), (10, 10), (130, 200), (1, 1)])
def test_win_rate_and_interval_are_those_of_scipy(wins, count):
    first = np.r_[np.ones(wins), np.zeros(count - wins)]
    second = np.full(count, 0.5)
    ours = win_rate(first, second)
    theirs = scipy_stats.binomtest(wins, count).proportion_ci(method="wilson")
    assert ours.value == wins / count
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], atol=1e-12)


def test_a_tie_is_half_a_win():
    assert win_rate(np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 3.0, 9.0])).value == 0.5


def test_win_rate_of_images_that_repeat_their_prompt_s_has_the_interval_of_the_prompts():
    rng = np.random.default_rng(0)
    first = rng.normal(size=40)
    groups = np.repeat(np.arange(40), 8)
    alone = win_rate(first, np.zeros(40))
    repeated = win_rate(np.repeat(first, 8), np.zeros(320), groups)
    assert repeated.value == alone.value
    np.testing.assert_allclose([repeated.low, repeated.high], [alone.low, alone.high], atol=1e-12)
    all_won = win_rate(np.ones(320), np.zeros(320), groups)
    wilson = scipy_stats.binomtest(40, 40).proportion_ci(method="wilson")
    np.testing.assert_allclose([all_won.low, all_won.high], [wilson.low, wilson.high], atol=1e-12)


@pytest.mark.parametrize(
    ("wins", "images", "effective"),
    [
        ([2, 2, 1, 3], 4, 16),  # the prompts differ less than by chance: no more than all images
        ([1, 3, 3, 5], 6, 0.25 * 4 / (2 * (1 / 3) ** 2 / 3)),  # p(1−p) P/s², 13.5
        ([0, 4, 4, 0], 4, 4),  # each prompt's images agree: no fewer than the prompts
    ],
)
def test_win_rate_s_interval_is_wilson_s_of_the_effective_number_of_images(wins, images, effective):
    first = np.concatenate([np.r_[np.ones(k), -np.ones(images - k)] for k in wins])
    found = win_rate(first, np.zeros(len(first)), np.repeat(np.arange(4), images))
    assert found.value == 0.5
    # The rates π with (p − π)² = z² π(1−π)/n.
    z2 = scipy_stats.norm.ppf(0.975) ** 2 / effective
    low, high = sorted(np.roots([1 + z2, -(1 + z2), 0.25]))
    np.testing.assert_allclose([found.low, found.high], [low, high], rtol=1e-9)


def test_win_rate_s_interval_covers_what_it_says_whatever_the_images_of_a_prompt_share():
    # 60 prompts of 6 images whose scores share a part; the true rate is a half by symmetry.
    rng, groups = np.random.default_rng(1), np.repeat(np.arange(60), 6)
    for shared in (0.0, 0.5, 2.0):
        covered = 0
        for _ in range(400):
            scores = shared * np.repeat(rng.normal(size=60), 6) + rng.normal(size=360)
            interval = win_rate(scores, np.zeros(360), groups)
            covered += interval.low <= 0.5 <= interval.high
        assert 0.90 < covered / 400 < 0.99, shared


def test_images_of_a_prompt_are_averaged_in_the_order_of_the_prompts():
    values = by_prompt(np.array([1.0, 5.0, 3.0, 7.0]), [2, 0, 2, 0])
    assert values.tolist() == [6.0, 2.0]


def test_monitors_are_those_of_scipy_and_pillow():
    from scipy import ndimage

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)
    images[1] = 255
    measured = monitor(images)
    luma = images[0].astype(float) @ [0.299, 0.587, 0.114]
    expected = ndimage.laplace(luma)[1:-1, 1:-1].std()
    np.testing.assert_allclose(measured["sharpness"], [expected, 0], atol=1e-9)
    hsv = np.asarray(Image.fromarray(images[0]).convert("HSV"))[..., 1]
    np.testing.assert_allclose(measured["saturation"][0], hsv.mean() / 255, atol=3e-3)
    assert measured["saturation"][1] == 0
    gray = np.asarray(Image.fromarray(images[0]).convert("L"))  # rounded
    np.testing.assert_allclose(measured["brightness"], [gray.mean(), 255], atol=0.5)
    buffer = io.BytesIO()
    Image.fromarray(images[0]).save(buffer, "JPEG", quality=95)
    assert measured["jpeg_kilobytes"][0] == len(buffer.getvalue()) / 1000


def test_diversity_is_zero_for_copies_and_the_distance_of_two_flat_pictures():
    flat = np.broadcast_to(
        np.array([0, 51, 0, 0, 102], np.uint8).reshape(5, 1, 1, 1), (5, 64, 64, 3)
    ).copy()
    measured = diversity(flat, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(measured[:2], [0.2, 0.0])
    assert np.isnan(measured[2])
    # pairs of three flat pictures: 0.2, 0.4 and 0.2
    np.testing.assert_allclose(diversity(flat[[0, 1, 4]], [0, 0, 0]), [0.8 / 3])


def test_diversity_is_of_the_means_of_areas_and_of_the_square_of_what_differs():
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 102).astype(np.uint8)
    boards = np.stack([board, 102 - board])[..., None].repeat(3, axis=-1)
    assert diversity(boards, [0, 0]).tolist() == [0.0]  # to 32 x 32 both are the same gray
    half = np.zeros((2, 64, 64, 3), np.uint8)
    half[1, :32] = 255
    np.testing.assert_allclose(diversity(half, [0, 0]), [np.sqrt(0.5)])


def test_monitors_of_many_images_are_those_of_each():
    images = np.random.default_rng(0).integers(0, 256, (35, 8, 8, 3), dtype=np.uint8)
    measured = monitor(images)
    for i in (0, 15, 16, 31, 32, 34):
        for name, values in monitor(images[i : i + 1]).items():
            assert len(measured[name]) == 35 and measured[name][i] == pytest.approx(values[0])
