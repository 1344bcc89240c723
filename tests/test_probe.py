"""The drift probe: exact agreement is found, a difference is measured and refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_policy import PARAMS, SCHEDULE, B, T, batch_for, plan_for, policy

from diffusion_grpo.errors import UsageError
from diffusion_grpo.loss import LossConfig, compile_loss
from diffusion_grpo.probe import check_drift, measure_drift


@pytest.mark.parametrize("ratio", ["trajectory", "step"])
def test_drift_is_what_the_recorded_log_probs_are_off_by(ratio):
    config = LossConfig(ratio=ratio, microbatch=3)
    loss, plan, batch = compile_loss(policy, config), plan_for(config), batch_for()

    def drift(batch):
        return measure_drift(loss, PARAMS, None, SCHEDULE, batch, plan)

    agreed = drift(batch)
    assert agreed.shape == ((B,) if ratio == "trajectory" else (3 * T,))
    assert agreed.max() < 1e-6  # the float32 rounding of log-probs of size 1
    off = jnp.arange(T * B, dtype=jnp.float32).reshape(T, B) / 100
    trajectory = batch.trajectory._replace(log_probs=batch.trajectory.log_probs + off)
    measured = drift(batch._replace(trajectory=trajectory))
    want = off.sum(axis=0) if ratio == "trajectory" else off[:, :3].reshape(-1)
    np.testing.assert_allclose(measured, want, atol=2e-6)


def test_a_drift_beyond_the_clip_range_is_refused_unless_allowed():
    plan = plan_for(LossConfig(), clip=0.01)
    small, large = np.full(100, 0.009), np.r_[np.zeros(90), np.full(10, 0.011)]
    line = check_drift(small, plan, clips=True, allow=False)
    assert "p50 0.009, p99 0.009" in line and "0.01 down and 0.01 up" in line
    with pytest.raises(UsageError, match="p50 0, p99 0.011.*--grpo.allow-drift True"):
        check_drift(large, plan, clips=True, allow=False)
    assert "p99 0.011" in check_drift(large, plan, clips=True, allow=True)
    assert "clip" not in check_drift(large, plan, clips=False, allow=False)
    with pytest.raises(UsageError, match="not finite"):
        check_drift(np.r_[large, np.nan], plan, clips=True, allow=True)
