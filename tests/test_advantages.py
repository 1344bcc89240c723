"""Advantages against float64 re-derivations, sample by sample."""

from collections import defaultdict, deque

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.advantages import (
    RewardHistory,
    best_and_worst,
    clip_advantages,
    discounts,
    group_advantages,
    running_advantages,
    uninformative_groups,
    weighted_advantages,
)
from diffusion_grpo.errors import UsageError

REWARDS = np.array([0.1, 0.4, 0.35, 2.0, -1.0, 0.0, 5.7, 5.8, 5.71, 3.0, 3.0, 4.0], np.float32)
KINDS = ("group", "group_mean", "group_global_std", "leave_one_out")


def derived(rewards, size, kind, eps=1e-8):
    """The formulas in float64, sample by sample."""
    r = rewards.astype(np.float64)
    out = np.zeros_like(r)
    for i in range(len(r)):
        start = i // size * size
        group = r[start : start + size]
        others = np.delete(group, i - start)
        out[i] = {
            "group": (r[i] - group.mean()) / (group.std() + eps),
            "group_mean": r[i] - group.mean(),
            "group_global_std": (r[i] - group.mean()) / (r.std() + eps),
            "leave_one_out": r[i] - others.mean(),
        }[kind]
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_advantages_equal_the_formula_in_float64(kind, size):
    ours = group_advantages(jnp.asarray(REWARDS), size, kind=kind)
    np.testing.assert_allclose(ours, derived(REWARDS, size, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_eps_is_added_to_the_standard_deviation(kind):
    rewards = jnp.asarray(REWARDS)
    want = derived(REWARDS, 4, kind, eps=0.5)
    ours = group_advantages(rewards, 4, kind=kind, eps=0.5)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
    each = weighted_advantages({"a": rewards}, {"a": 2.0}, 4, kind=kind, eps=0.5)
    np.testing.assert_allclose(each, 2 * want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_rewards_have_in_common_is_without_effect(kind):
    rewards = np.array([0, 1, 1, 5, 2, 2, 3, 9, -4, 0, 7, 8], np.float32)
    common = np.float32(10_000_000)  # float32 holds these sums exactly, but not that of them all
    ours = group_advantages(jnp.asarray(rewards + common), 4, kind=kind)
    np.testing.assert_allclose(ours, derived(rewards, 4, kind), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 5.7, 22.13, 1e6, -0.3])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 12])
def test_equal_rewards_give_exactly_zero_advantage(value, size):
    rewards = jnp.full((2 * size,), value, jnp.float32)
    for kind in KINDS:
        assert (group_advantages(rewards, size, kind=kind) == 0).all()
    scores = {"a": rewards, "b": 0.3 * rewards}
    assert (weighted_advantages(scores, {"a": 0.7, "b": -2.0}, size) == 0).all()
    index = np.repeat([1, 0], size)
    for min_count in (2, 100):  # of the prompt's own statistics, and of the batch's
        history = RewardHistory.empty(2, 16)
        for _ in range(3):
            ours, history = running_advantages(rewards, index, history, min_count=min_count)
            assert (ours == 0).all()
    assert uninformative_groups(rewards, size).all()


def test_one_equal_group_beside_another_is_zero_for_the_global_std_too():
    rewards = jnp.asarray([5.7] * 3 + [1.0, 2.0, 4.0], jnp.float32)
    advantages = group_advantages(rewards, 3, kind="group_global_std")
    assert (advantages[:3] == 0).all() and (advantages[3:] != 0).all()
    assert uninformative_groups(rewards, 3).tolist() == [True, False]
    # However little they differ.
    assert uninformative_groups(1e-9 * rewards, 3).tolist() == [True, False]


def test_advantages_are_clipped():
    rewards = jnp.asarray([0.0] * 15 + [1.0], jnp.float32)
    free = group_advantages(rewards, 16)
    assert float(free.max()) == pytest.approx(np.sqrt(15), rel=1e-5)
    assert float(clip_advantages(free, 2.0, "group").max()) == 2.0
    assert float(clip_advantages(-free, 2.0, "group").min()) == -2.0


@pytest.mark.parametrize(("count", "size", "named"), [(6, 1, "2 or more"), (6, 4, "do not divide")])
def test_groups_that_do_not_fit_are_errors(count, size, named):
    with pytest.raises(UsageError, match=named):
        group_advantages(jnp.zeros(count), size)


@pytest.mark.parametrize("kind", KINDS)
def test_each_reward_is_normalized_before_it_is_weighted(kind):
    scores = {"a": REWARDS, "b": np.float32(1000) * REWARDS[::-1].copy()}
    ours = weighted_advantages(
        {name: jnp.asarray(score) for name, score in scores.items()},
        {"a": 2.0, "b": -0.5},
        4,
        kind=kind,
    )
    want = 2.0 * derived(scores["a"], 4, kind) - 0.5 * derived(scores["b"], 4, kind)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_a_reward_of_large_scale_drowns_no_other():
    small = jnp.asarray([0.0, 1.0, 0.0, 1.0])
    large = jnp.asarray([0.0, 0.0, 1000.0, 1000.0])
    mixed = group_advantages(small + large, 4)
    each = weighted_advantages({"s": small, "l": large}, {"s": 1.0, "l": 1.0}, 4)
    assert abs(float(mixed[0] - mixed[1])) < 0.01
    np.testing.assert_allclose(each, [-2.0, 0.0, 0.0, 2.0], atol=1e-5)


def test_weights_of_other_rewards_are_refused():
    with pytest.raises(ValueError, match="'b'"):
        weighted_advantages({"a": jnp.zeros(4)}, {"b": 1.0}, 4)


def ddpo_statistics(batches, size, min_count, eps=1e-8):
    """A queue a prompt, as DDPO's paper describes its statistics, in float64."""
    queues = defaultdict(lambda: deque(maxlen=size))
    for rewards, index in batches:
        rewards = rewards.astype(np.float64)
        out = np.empty_like(rewards)
        for prompt in set(index.tolist()):
            mine = rewards[index == prompt]
            queues[prompt].extend(mine)
            known = np.array(queues[prompt]) if len(queues[prompt]) >= min_count else rewards
            out[index == prompt] = (mine - known.mean()) / (known.std() + eps)
        yield out


@pytest.mark.parametrize(
    ("size", "min_count", "eps"),
    [(5, 4, 1e-8), (8, 8, 1e-8), (32, 1, 1e-8), (6, 7, 1e-8), (8, 8, 0.5)],
)
def test_running_advantages_equal_a_queue_of_each_prompt(size, min_count, eps):
    rng = np.random.default_rng(0)
    batches = [
        (rng.normal(3, 2, 12).astype(np.float32), np.repeat(rng.permutation(7)[:3], 4))
        for _ in range(9)
    ]
    history = RewardHistory.empty(7, size)
    for (rewards, index), want in zip(
        batches, ddpo_statistics(batches, size, min_count, eps), strict=True
    ):
        before = [leaf.copy() for leaf in history]
        ours, new = running_advantages(rewards, index, history, min_count=min_count, eps=eps)
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)
        for old, kept in zip(before, history, strict=True):  # a function: its input stays
            np.testing.assert_array_equal(old, kept)
        history = new


def test_best_and_worst_of_each_group():
    advantages = jnp.asarray([0.3, -2.0, 1.0, 0.0, 5.0, 4.0, -1.0, 4.5, -0.5, 6.0])
    assert best_and_worst(advantages, 5, 1).tolist() == [1, 4, 6, 9]
    # all but the middle one: 0.3 and 4.0
    assert best_and_worst(advantages, 5, 2).tolist() == [1, 2, 3, 4, 6, 7, 8, 9]


def test_all_of_an_even_group_may_be_chosen_and_ties_are_by_place():
    assert best_and_worst(jnp.zeros(8), 4, 2).tolist() == list(range(8))
    assert best_and_worst(jnp.zeros(8), 4, 1).tolist() == [0, 3, 4, 7]
    many = jnp.asarray([0.0, 1.0] * 100)
    assert best_and_worst(many, 200, 3).tolist() == [0, 2, 4, 195, 197, 199]


@pytest.mark.parametrize("count", [0, 3])
def test_more_than_a_group_holds_cannot_be_chosen(count):
    with pytest.raises(UsageError, match="expected 1 to 2"):
        best_and_worst(jnp.zeros(10), 5, count)


def test_discounts_count_the_steps_that_remain():
    np.testing.assert_allclose(discounts(0.9, 4), [0.729, 0.81, 0.9, 1.0], rtol=1e-6)
    assert (discounts(1.0, 5) == 1).all()
