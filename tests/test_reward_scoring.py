"""How rewards are run: by group, cached, again after a failure, beside the sampler."""

import itertools
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo import reward_run
from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import (
    FailurePolicy,
    RewardError,
    RewardSet,
    combine,
    of_group,
    on_device,
    wrap_reward,
)
from diffusion_grpo.reward_failure import parse_failure_policies
from diffusion_grpo.reward_run import ScoreCache
from diffusion_grpo.reward_scores import RewardResult, correlations


def numbered(count: int) -> np.ndarray:
    """Images that are told apart by their first pixel."""
    images = np.zeros((count, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


def number(images: Any, prompts: Any, metadata: Any) -> np.ndarray:
    return np.asarray(images)[:, 0, 0, 0].astype(np.float32)


def set_of(*functions: Any, **fields: Any) -> RewardSet:
    loaded = tuple(wrap_reward(f, name=getattr(f, "__name__", "reward")) for f in functions)
    return RewardSet(loaded, (1.0,) * len(loaded), **fields)


def failing_on(*bad: int, times: int = 10**9) -> Any:
    """A reward that raises when one of these images is in its batch, and counts its calls."""

    def fails(images, prompts, metadata):
        fails.calls.append([int(i) for i in images[:, 0, 0, 0]])
        if set(bad) & set(fails.calls[-1]) and fails.left > 0:
            fails.left -= 1
            raise RuntimeError("no connection")
        return number(images, prompts, metadata)

    fails.calls, fails.left = [], times
    return fails


# --- Groups -------------------------------------------------------------------------------------


def test_a_reward_of_a_group_sees_one_group_at_a_time() -> None:
    seen = []

    @of_group
    def rank(images, prompts, metadata):
        seen.append((images[:, 0, 0, 0].tolist(), prompts, metadata))
        return np.argsort(images[:, 0, 0, 0]).astype(np.float32)

    prompts = ["a"] * 3 + ["b"] * 3
    details = [{"k": 0}] * 3 + [{"k": 1}] * 3
    result = set_of(rank)(numbered(6), prompts, details, group_size=3)
    assert seen == [([0, 1, 2], ["a"] * 3, [{"k": 0}] * 3), ([3, 4, 5], ["b"] * 3, [{"k": 1}] * 3)]
    np.testing.assert_array_equal(result.total, [0, 1, 2, 0, 1, 2])


def test_a_reward_of_a_group_needs_groups() -> None:
    rank = of_group(lambda images, prompts, metadata: number(images, prompts, metadata))
    rank.__name__ = "rank"
    with pytest.raises(UsageError, match="'rank' compares the images of a group, but images have"):
        set_of(rank)(numbered(4), ["a"] * 4)
    with pytest.raises(UsageError, match="but a group has 1; expected groups of 2 or more"):
        set_of(rank)(numbered(4), ["a"] * 4, group_size=1)
    with pytest.raises(ValueError, match="4 images are no whole number of groups of 3"):
        set_of(rank)(numbered(4), ["a"] * 4, group_size=3)
    with pytest.raises(UsageError, match="eval.images_per_prompt is 1, but reward 'rank' compares"):
        set_of(rank).check(["a"], [{}], group_size=1, what="eval.images_per_prompt")


def test_prompts_that_a_reward_cannot_judge_are_found_before_the_run() -> None:
    def judge(images, prompts, metadata):
        return number(images, prompts, metadata)

    def check(prompts, metadata):
        if "no quotes" in prompts:
            raise UsageError("judge: prompt 'no quotes' has none")

    judge.check = check
    set_of(judge).check(["fine"], [{}], group_size=2, what="")
    with pytest.raises(UsageError, match="prompt 'no quotes' has none"):
        set_of(judge).check(["fine", "no quotes"], [{}] * 2, group_size=2, what="")
    judge.check = 3
    with pytest.raises(UsageError, match="has check 3: expected a function"):
        set_of(judge)


# --- Beside the sampler ---------------------------------------------------------------------------


def test_images_that_come_in_another_order_keep_their_prompts_and_groups() -> None:
    """As they come from several devices, each with whole groups: shard by shard."""
    groups = []

    def host(images, prompts, metadata):
        assert [item["n"] for item in metadata] == [int(text) for text in prompts]
        return number(images, prompts, metadata) + 100 * np.array(prompts, np.float32)

    @on_device
    def device(images, prompts, metadata):
        levels = jnp.round(255 * images[:, 0, 0, 0])
        return levels + 100 * jnp.array([float(text) for text in prompts])

    @of_group
    def rank(images, prompts, metadata):
        groups.append((images[:, 0, 0, 0].tolist(), set(prompts)))
        return host(images, prompts, metadata)

    prompts = [str(number) for number in (0, 0, 1, 1, 2, 2, 3, 3)]
    details = [{"n": int(text)} for text in prompts]
    order = np.array([0, 1, 4, 5, 2, 3, 6, 7])
    expected = np.arange(8) + 100 * np.repeat(np.arange(4), 2)
    rewards = set_of(host, device, rank)
    for sizes in ((4, 4), (8,), (2, 2, 2, 2)):
        with rewards.start(prompts, details, group_size=2, order=order) as scoring:
            for places in np.split(order, np.cumsum(sizes)[:-1]):
                scoring.add(numbered(8)[places])
            result = scoring.result()
        for name in ("host", "device", "rank"):
            np.testing.assert_allclose(result.scores[name], expected, atol=1e-3)
    assert sorted(groups[:4]) == [([2 * g, 2 * g + 1], {str(g)}) for g in range(4)]


@pytest.mark.parametrize("chunks", [(6,), (2, 4), (1, 1, 1, 1, 1, 1), (4, 0, 2)])
def test_scores_do_not_depend_on_how_the_images_arrive(chunks) -> None:
    group_calls = []

    def host(images, prompts, metadata):
        return number(images, prompts, metadata) + [float(prompt) for prompt in prompts]

    @on_device
    def device(images, prompts, metadata):
        return jnp.round(images[:, 0, 0, 0] * 255)

    @of_group
    def group(images, prompts, metadata):
        group_calls.append(len(images))
        return images[:, 0, 0, 0] - images[:, 0, 0, 0].mean()

    images = numbered(6)
    prompts = ["0", "0", "10", "10", "20", "20"]
    with set_of(host, device, group).start(prompts, group_size=2) as scoring:
        start = 0
        for size in chunks:
            part = images[start : start + size]
            scoring.add(jnp.asarray(part) if start % 4 else part)
            start += size
        result = scoring.result()
    np.testing.assert_array_equal(result.scores["host"], [0, 1, 12, 13, 24, 25])
    np.testing.assert_array_equal(result.scores["device"], np.arange(6))
    np.testing.assert_array_equal(result.scores["group"], [-0.5, 0.5] * 3)
    assert group_calls == [2, 2, 2]
    np.testing.assert_array_equal(result.matrix, np.stack(list(result.scores.values()), axis=1))


def test_host_rewards_work_while_later_images_are_awaited() -> None:
    begun = threading.Event()

    def host(images, prompts, metadata):
        begun.set()
        return number(images, prompts, metadata)

    with set_of(host).start(["a"] * 4) as scoring:
        scoring.add(numbered(4)[:2])
        assert begun.wait(60)  # before the others were added
        scoring.add(numbered(4)[2:])
        np.testing.assert_array_equal(scoring.result().total, np.arange(4))


def test_a_failure_is_told_as_soon_as_the_next_images_come() -> None:
    failed = threading.Event()

    def fails(images, prompts, metadata):
        failed.set()
        raise RuntimeError("no connection")

    with set_of(fails).start(["a"] * 4) as scoring:
        scoring.add(numbered(4)[:2])
        failed.wait(60)
        with pytest.raises(RewardError, match="reward 'fails' failed: RuntimeError: no connection"):
            for _ in range(1000):  # the thread needs a moment to say so
                scoring.add(numbered(4)[:0])
                threading.Event().wait(0.01)


def test_too_few_and_too_many_images_are_errors() -> None:
    with set_of(number).start(["a"] * 4) as scoring:
        scoring.add(numbered(3))
        with pytest.raises(ValueError, match="3 images and 4 prompts"):
            scoring.result()
        with pytest.raises(ValueError, match="5 images and 4 prompts"):
            scoring.add(numbered(2))


def test_the_first_bad_index_counts_over_all_parts() -> None:
    def bad(images, prompts, metadata):
        return [np.nan if n == 5 else 0.0 for n in images[:, 0, 0, 0]]

    with set_of(bad).start(["a"] * 6) as scoring:
        scoring.add(numbered(6)[:3])
        scoring.add(numbered(6)[3:])
        with pytest.raises(RewardError, match="'bad' returned nan for image 5"):
            scoring.result()


# --- Failures -------------------------------------------------------------------------------------


def test_policies_are_parsed_and_what_cannot_be_meant_is_an_error() -> None:
    policies = parse_failure_policies(
        ("retry=2", "ocr=drop-group", "clip=stop"), "abc clip ocr".split()
    )
    assert policies == {
        "abc": FailurePolicy("retry", 2),
        "clip": FailurePolicy("stop"),
        "ocr": FailurePolicy("drop-group"),
    }
    assert parse_failure_policies((), ["clip"]) == {"clip": FailurePolicy("stop")}
    for entries, message in (
        (("skip",), "'skip'; expected stop, retry=N .such as retry=3. or drop-group"),
        (("retry",), "'retry'; expected stop"),
        (("clp=stop",), "'clp', which is not used .did you mean 'clip'..; rewards in use: clip"),
        (("clip=stop", "clip=retry=1"), "second policy 'clip=retry=1' for 'clip'"),
        (("stop", "retry=1"), "second policy 'retry=1' for the rewards without a name"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_failure_policies(entries, ["clip"])


def test_stop_is_the_default() -> None:
    fails = failing_on(0)
    with pytest.raises(RewardError, match="reward 'fails' failed: RuntimeError: no connection"):
        set_of(fails)(numbered(2), ["a"] * 2, group_size=2)
    assert len(fails.calls) == 1


def test_a_failed_call_is_repeated_with_growing_pauses(monkeypatch) -> None:
    pauses = []
    monkeypatch.setattr(reward_run.time, "sleep", pauses.append)
    policy = (FailurePolicy("retry", 3),)
    result = set_of(failing_on(1, times=2), policies=policy)(numbered(2), ["a"] * 2)
    np.testing.assert_array_equal(result.total, [0, 1])
    assert pauses == [0.5, 1.0]
    assert len(result.notes) == 2 and "call 1 of 4 failed, again after 0.5 s" in result.notes[0]
    with pytest.raises(RewardError, match=r"no connection.*\(tried 4 times\)"):
        set_of(failing_on(1), policies=policy)(numbered(2), ["a"] * 2)
    assert pauses[2:] == [0.5, 1.0, 2.0]
    many = (FailurePolicy("retry", 8),)
    set_of(failing_on(1, times=8), policies=many)(numbered(2), ["a"] * 2)
    assert pauses[5:] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_what_the_user_has_to_mend_is_not_repeated() -> None:
    def judge(images, prompts, metadata):
        judge.calls += 1
        raise UsageError("judge: images of 8 pixels")

    judge.calls = 0
    for kind in ("retry", "drop-group"):
        with pytest.raises(RewardError, match="images of 8 pixels"):
            set_of(judge, policies=(FailurePolicy(kind, 3),))(numbered(2), ["a"] * 2)
    assert judge.calls == 2


@pytest.mark.parametrize("chunks", [(8,), (3, 5)])
def test_only_the_groups_that_a_reward_fails_on_are_dropped(chunks) -> None:
    fails, other = failing_on(3), lambda images, prompts, metadata: np.ones(len(images))
    other.__name__ = "other"
    rewards = set_of(
        fails, other, policies=(FailurePolicy("drop-group"), FailurePolicy()), max_dropped=0.25
    )
    with rewards.start(["a"] * 8, group_size=2, may_drop=True) as scoring:
        start = 0
        for size in chunks:
            scoring.add(numbered(8)[start : start + size])
            start += size
        result = scoring.result()
    np.testing.assert_array_equal(result.kept, [True, True, False, False] + [True] * 4)
    np.testing.assert_array_equal(result.total, [1, 2, np.nan, np.nan, 5, 6, 7, 8])
    metrics = result.metrics()
    assert metrics["reward/dropped"] == 0.25
    assert metrics["reward/mean"] == pytest.approx(29 / 6)
    assert metrics["reward/std"] == pytest.approx(np.std([1, 2, 5, 6, 7, 8]))
    assert metrics["reward/fails/max"] == 7
    # In parts of 3 and 5 it has scored the other image of the group before it fails on this one.
    assert metrics["reward/fails/dropped"] == (2 if chunks == (8,) else 1) / 8
    assert metrics["reward/other/dropped"] == 0
    assert any("group 1 is dropped: reward 'fails' failed" in note for note in result.notes)


def test_past_the_limit_of_dropped_groups_scoring_fails() -> None:
    policies = (FailurePolicy("drop-group"),)
    rewards = set_of(failing_on(1, 5), policies=policies, max_dropped=0.25)
    with rewards.start(["a"] * 8, group_size=2, may_drop=True) as scoring:
        scoring.add(numbered(8))
        with pytest.raises(
            RewardError, match=r"2 of 4 groups were dropped.*max_dropped = 0\.25; the last: group 2"
        ):
            scoring.result()


def test_no_group_is_dropped_where_all_images_count() -> None:
    rewards = set_of(failing_on(1), policies=(FailurePolicy("drop-group"),))
    with pytest.raises(RewardError, match="no connection"):
        rewards(numbered(4), ["a"] * 4, group_size=2)


# --- Cache ----------------------------------------------------------------------------------------


def test_equal_images_with_equal_prompts_are_scored_once() -> None:
    counting = failing_on()
    rewards = set_of(counting, caches=(ScoreCache(),))
    images = numbered(4)[[0, 1, 0, 1]]
    first = rewards(images, ["a", "a", "a", "b"])
    assert counting.calls == [[0, 1, 1]] and first.cached == {"fails": 0.25}
    np.testing.assert_array_equal(first.total, [0, 1, 0, 1])
    again = rewards(numbered(3), ["a"] * 3, [{}, {}, {"seed": 1}])
    assert counting.calls[1:] == [[2]] and again.metrics()["reward/fails/cached"] == pytest.approx(
        2 / 3
    )
    rewards(numbered(3), ["a"] * 3, [{}, {"seed": 2}, {"seed": 1}])
    assert counting.calls[2:] == [[1]]


def test_a_score_is_known_by_pixels_shape_prompt_and_what_the_metadata_say() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    key = ScoreCache.key(image, "a", {"seed": 1, "size": 2})
    assert key == ScoreCache.key(image.copy(), "a", {"size": 2, "seed": 1})
    assert key == ScoreCache.key(np.asfortranarray(image), "a", {"seed": 1, "size": 2})
    others = [
        ScoreCache.key(image.reshape(4, 2, 3), "a", {"seed": 1, "size": 2}),
        ScoreCache.key(image + np.uint8(1), "a", {"seed": 1, "size": 2}),
        ScoreCache.key(image, "b", {"seed": 1, "size": 2}),
        ScoreCache.key(image, "a", {"seed": 2, "size": 2}),
    ]
    assert len({key, *others}) == 5


def test_a_failure_is_not_remembered_as_a_score() -> None:
    fails = failing_on(1, times=1)
    rewards = set_of(
        fails, policies=(FailurePolicy("drop-group"),), caches=(ScoreCache(),), max_dropped=1.0
    )
    totals = []
    for _ in range(2):
        with rewards.start(["a"] * 2, group_size=2, may_drop=True) as scoring:
            scoring.add(numbered(2))
            totals.append(scoring.result().total.tolist())
    assert np.isnan(totals[0]).all() and totals[1] == [0, 1]


def test_a_cache_forgets_what_was_least_recently_used() -> None:
    cache = ScoreCache(capacity=2)
    keys = [cache.key(image, "a", {}) for image in numbered(3)]
    for key, score in zip(keys[:2], (1.0, 2.0), strict=True):
        cache.put(key, score)
    assert cache.get(keys[0]) == 1.0
    cache.put(keys[2], 3.0)
    assert [cache.get(key) for key in keys] == [1.0, None, 3.0]


def test_a_reward_of_a_group_is_not_cached() -> None:
    rank = of_group(lambda images, prompts, metadata: number(images, prompts, metadata))
    with pytest.raises(UsageError, match="which compares the images of a group"):
        set_of(rank, caches=(ScoreCache(),))


# --- Combination ----------------------------------------------------------------------------------


def test_rewards_are_combined_as_their_formulas_say() -> None:
    rng = np.random.default_rng(0)
    scores = {name: rng.normal(size=5).astype(np.float32) for name in "abc"}
    weights = {"a": 1.0, "b": -0.5, "c": 2.0}
    terms = np.array([weights[name] * scores[name].astype(np.float64) for name in "abc"])
    expected = {
        "weighted": [sum(column) for column in terms.T],
        "min": [sorted(column)[0] for column in terms.T],
        "ensemble": [
            sum(c) / 3 - 1.5 * (sum((x - sum(c) / 3) ** 2 for x in c) / 3) ** 0.5 for c in terms.T
        ],
    }
    for kind, values in expected.items():
        found = combine(scores, weights, kind, pessimism=1.5)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, values, rtol=1e-6)


def test_the_order_of_the_rewards_does_not_show_in_their_sum() -> None:
    scores = {"a": 2.0**24, "b": 1.0, "c": -(2.0**24)}  # whose sum float32 cannot hold
    for names in itertools.permutations(scores):
        given = {name: np.array([scores[name]], np.float32) for name in names}
        assert combine(given, dict.fromkeys(names, 1.0)).tolist() == [1.0]


def test_correlations_are_of_the_images_kept() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    kept = np.array([True, True, False, False, True, True])
    a[2] = np.nan
    total = np.where(kept, a + b, np.nan)
    seconds, weights = dict.fromkeys("ab", 0.0), dict.fromkeys("ab", 1.0)
    found = RewardResult({"a": a, "b": b}, total, seconds, weights, kept).metrics()
    want = np.corrcoef(a[kept], b[kept])[0, 1]
    assert found["reward/correlation/a:b"] == pytest.approx(want, rel=1e-5)


def test_correlations_are_pearsons_and_constant_rewards_have_none() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20)).astype(np.float32)
    found = correlations({"a": a, "b": b, "c": -a, "one": np.ones(20, np.float32)})
    assert found.keys() == {f"reward/correlation/{pair}" for pair in ("a:b", "a:c", "b:c")}
    assert found["reward/correlation/a:b"] == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-5)
    assert found["reward/correlation/a:c"] == pytest.approx(-1.0)


def test_a_result_has_the_statistics_of_every_member() -> None:
    result = set_of(number, lambda images, prompts, metadata: np.ones(len(images)))
    metrics = result(numbered(4), ["a"] * 4).metrics()
    assert [metrics[f"reward/number/{s}"] for s in ("mean", "std", "min", "max")] == [
        1.5,
        pytest.approx(np.sqrt(1.25)),
        0,
        3,
    ]
    assert metrics["reward/std"] == pytest.approx(np.sqrt(1.25))
    assert metrics["reward/mean"] == 2.5 and metrics["time/reward/number"] >= 0
    assert "reward/dropped" not in metrics
