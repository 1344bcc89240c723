"""The loss as the papers write it, for the tests of the accumulated update."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm
from tiny_policy import CONDITION, SCHEDULE, SCHEDULER, SIZE, B, T, noise, policy

from diffusion_grpo.schedule import alphas_cumprod, step_distribution


def clipped(rho, a, low, high, dual=None):
    objective = jnp.minimum(a * rho, a * jnp.clip(rho, 1 - low, 1 + high))
    if dual is not None:
        objective = jnp.where(a < 0, jnp.maximum(objective, dual * a), objective)
    return -objective


def whole_loss(params, config, plan, beta, batch):
    """Return it, all steps and images at once, with the densities of jax.scipy."""
    x, a = batch.trajectory.latents, batch.advantages
    schedule = noise(params, SCHEDULE) if config.learned_noise else SCHEDULE
    reduce = functools.partial(jnp.mean if config.reduction == "mean" else jnp.sum, axis=(1, 2, 3))
    active = np.asarray(plan.active).tolist()
    abar = alphas_cumprod(SCHEDULER)
    logs, kls, losses, entropy = {}, [], [], 0.0
    for i in active:
        out = policy(params, None)(x[i], SCHEDULE.timesteps[i], CONDITION)
        mean, std = step_distribution(schedule, i, x[i], out)
        logs[i] = reduce(norm.logpdf(x[i + 1], mean, std))
        fixed, std_ref = batch.reference.means[i], SCHEDULE.std[i]
        if config.kl == "flow_grpo":
            t = int(SCHEDULE.timesteps[i])
            signal, scale = np.sqrt([abar[t], abar[t - 1000 // T] if i < T - 1 else abar[0]]), None
            scale = np.sqrt(1 - signal**2)
            tau = scale / (signal + scale)
            # both means on the straight path of flow matching, whose noise a unit of time is σ²/dt
            unit = 1 / (signal[1] + scale[1])
            rate = (unit * std) ** 2 / (tau[0] - tau[1])
            kls.append(jnp.square(unit * (mean - fixed)).mean((1, 2, 3)) / (2 * rate) / len(active))
        else:
            each = jnp.log(std_ref / std) + (std**2 + (mean - fixed) ** 2) / (2 * std_ref**2) - 0.5
            kls.append(reduce(each))
        entropy += reduce(-norm.logpdf(0 * mean + std, 0, std))[0]  # log σ + ½ log 2π + ½
        if config.ratio == "step":
            base = batch.reference if config.ratio_base == "reference" else batch.old
            recorded = base.log_probs if config.ratio_base == "reference" else None
            exponent = logs[i] - (batch.trajectory.log_probs if recorded is None else recorded)[i]
            distance = reduce(jnp.square(mean - base.means[i])) / (2 * std**2)
            if config.guard:
                exponent = (exponent + distance) * std
            rho, adv = jnp.exp(exponent), plan.discounts[i] * a
            if config.dppo_kl is None:
                loss = clipped(rho, adv, plan.clip_low, plan.clip_high, plan.dual_clip)
            else:
                outward = jnp.where(adv > 0, rho > 1, rho < 1)
                loss = jnp.where((distance > config.dppo_kl) & outward, 0.0, -adv * rho)
            losses.append(plan.weights[i] * loss.mean() / len(active))
    if config.ratio == "trajectory":
        base = batch.reference if config.ratio_base == "reference" else batch.trajectory
        total = sum(plan.weights[i] * (logs[i] - base.log_probs[i]) for i in active)
        rho = jnp.exp(total)
        losses.append(clipped(rho, a, plan.clip_low, plan.clip_high, plan.dual_clip).mean())
    delta = sum(logs[i] - batch.reference.log_probs[i] for i in active)
    # k2 of the density's log-ratio, shared out like the exact KL; k3 likewise for small changes
    share = SIZE if config.reduction == "mean" else 1
    kl = {
        None: jnp.zeros(B),
        "k1": delta,
        "k2": (share * delta) ** 2 / 2 / share,
        "k3": (jnp.exp(-delta) - 1 + delta) * share,
        "exact": sum(kls),
        "flow_grpo": sum(kls),
    }[config.kl]
    return sum(losses) + beta * kl.mean() - config.entropy_coeff * entropy
