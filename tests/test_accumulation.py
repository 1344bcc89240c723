"""What metrics of microbatches and steps add up to, against the definitions in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.accumulation import ratio_metrics, reduce_metrics

LOG_RATIO = np.array([0.5, -0.7, 0.1, 0.0])  # of the ratio in the loss, weighted
FROM_OLD = np.array([0.4, -0.6, 0.3, -0.2])
CLIPPED = [True, True, False, False]


@pytest.mark.parametrize("elements", [1, 32])
def test_ratios_are_those_of_the_loss_and_the_kl_is_to_the_old_policy(elements):
    found = ratio_metrics(
        jnp.asarray(LOG_RATIO, jnp.float32),
        jnp.asarray(CLIPPED),
        jnp.asarray(FROM_OLD, jnp.float32),
        elements,
    )
    ratio = np.exp(LOG_RATIO)
    want = {
        "ratio/mean": ratio.sum(),
        "ratio/min": ratio[1],
        "ratio/max": ratio[0],
        "clip_fraction": 2.0,
        # Of draws x of the old policy, ρ − 1 − log ρ with ρ = π_θ(x)/π_old(x) has the mean
        # KL(π_old ‖ π_θ).
        "approx_kl": elements * (np.exp(FROM_OLD) - 1 - FROM_OLD).sum(),
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_extremes_are_of_all_microbatches_and_the_rest_is_a_mean_over_the_images():
    history = [
        {"ratio/min": 0.7, "ratio/max": 1.2, "ratio/mean": 3.0},
        {"ratio/min": 0.9, "ratio/max": 1.5, "ratio/mean": 5.0},
        {"ratio/min": 0.8, "ratio/max": 1.1, "ratio/mean": 2.0},
        {"kl": 6.0},
    ]
    arrays = [{name: jnp.float32(value) for name, value in each.items()} for each in history]
    found = reduce_metrics(arrays, 8)
    want = {"ratio/min": 0.7, "ratio/max": 1.5, "ratio/mean": 10 / 8, "kl": 6 / 8}
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
