"""A small real policy with a schedule, recorded trajectories and a reference, for the update."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion_grpo.rollout import sample
from diffusion_grpo.schedule import SchedulerConfig, make_schedule, scaled_noise
from diffusion_grpo.steps import plan_steps
from diffusion_grpo.trajectories import UpdateBatch, policy_steps

B, T, SHAPE = 6, 4, (4, 4, 2)
SIZE = 4 * 4 * 2
SCHEDULER = SchedulerConfig.from_dict(
    {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
)
SCHEDULE = make_schedule(SCHEDULER, T, eta=1.0)


class Network(nnx.Module):
    """A small policy with a time and a prompt input; pixels see each other through their mean."""

    def __init__(self, rngs):
        self.inner = nnx.Linear(4, 8, rngs=rngs)
        self.time = nnx.Linear(1, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x, t, condition):
        seen = jnp.concatenate([x, jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)], -1)
        h = self.inner(seen) + self.time(jnp.full((1, 1), t / 1000))[:, None, None]
        return self.outer(jax.nn.silu(h + condition[:, None, None, :]))


GRAPHDEF, NETWORK = nnx.split(Network(nnx.Rngs(0)))
PARAMS = {"network": NETWORK, "log_scale": jnp.asarray([0.1, -0.2, 0.05, 0.1])}
CONDITION = jax.random.normal(jax.random.key(1), (B, 8))


def policy(params, frozen):
    del frozen
    return lambda x, t, condition: nnx.merge(GRAPHDEF, params["network"])(
        x, t.astype(jnp.float32), condition
    )


def noise(params, schedule):
    return scaled_noise(schedule, params["log_scale"])


def moved(params, size=0.02, seed=7):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [p + size * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


REFERENCE = moved(PARAMS, 0.05, seed=8)


@functools.cache
def batch_for(reduction="mean", learned_noise=False):
    keys = jax.random.split(jax.random.key(2), B)
    start = jax.random.normal(jax.random.key(3), (B, *SHAPE))

    @jax.jit
    def draw(params):
        schedule = noise(params, SCHEDULE) if learned_noise else SCHEDULE
        return sample(policy(params, None), schedule, start, keys, CONDITION, reduction=reduction)

    @jax.jit
    def describe(params, latents):
        denoiser = policy(params, None)
        return policy_steps(
            denoiser, SCHEDULE, latents, CONDITION, jnp.arange(T), reduction=reduction
        )

    trajectory = draw(PARAMS)
    advantages = jnp.asarray([1.0, -0.5, 0.3, -1.2, 0.0, 0.8])
    reference, old = (describe(p, trajectory.latents) for p in (REFERENCE, PARAMS))
    return UpdateBatch(trajectory, CONDITION, advantages, reference, old)


def plan_for(config, *, clip=0.05, clip_high=None, scale_clip=False, **options):
    return plan_steps(
        SCHEDULE,
        latent_size=SIZE,
        clip_low=clip,
        clip_high=clip if clip_high is None else clip_high,
        ratio=config.ratio,
        reduction=config.reduction,
        scale_clip=scale_clip,
        **options,
    )
