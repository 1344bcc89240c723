"""Memory of one GRPO update against PPO with a value network as large as the policy.

    python benchmarks/ppo_memory.py                     # Stable Diffusion 1.5, all parameters
    python benchmarks/ppo_memory.py --trainable lora

Nothing is run and no weight exists: both updates are compiled for shapes alone, on the backend at
hand, and the compiled programs say what they need. Model, microbatch, precision and optimizer are
the same. PPO's value network is a second UNet whose output is averaged into V(x_t, t, prompt) and
trained in full on (V − R)²; it is written for this comparison only. (With a LoRA policy it is still
trained in full: a value function has no pretrained weights to adapt.)

The peak is what both hold all the time (parameters, optimizer state, gradient, the microbatch's
trajectory) and the largest temporary memory of their programs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.conditioning import conditioning_shapes
from diffusion_grpo.learning_sections import OptimConfig
from diffusion_grpo.lora import LoRAParam, attach_lora
from diffusion_grpo.loss import LossConfig, Pulls, Shares, compile_loss
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.optim import TrainState, make_optimizer
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.rollout import Trajectory
from diffusion_grpo.schedule import SchedulerConfig, make_schedule
from diffusion_grpo.sections import ModelConfig
from diffusion_grpo.steps import plan_steps
from diffusion_grpo.trajectories import UpdateBatch

SD15 = UNetConfig(sample_size=64, cross_attention_dim=768)
TINY = UNetConfig(
    sample_size=8,
    cross_attention_dim=16,
    block_out_channels=(32, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    attention_head_dim=2,
)


def size(tree: Any) -> int:
    """Bytes of a pytree of arrays or shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compare(
    config: UNetConfig, *, microbatch: int, steps: int, trainable: str, dtype: str
) -> dict[str, dict[str, int]]:
    """Return bytes of every part, for `grpo` and `ppo`."""
    compute = jnp.dtype(dtype)
    full = trainable == "full"

    def network(*, adapter: bool) -> UNet2DConditionModel:
        param_dtype = compute if adapter else jnp.float32
        unet = UNet2DConditionModel(
            config, dtype=compute, param_dtype=param_dtype, rngs=nnx.Rngs(0)
        )
        unet.gradient_checkpointing = True
        if adapter:
            targets = ModelConfig().lora_targets
            attach_lora(unet, targets=targets, rank=16, alpha=16.0, rngs=nnx.Rngs(0))
        return unet

    policy = TrainablePolicy(
        nnx.eval_shape(lambda: network(adapter=not full)), 1.0, nnx.Param if full else LoRAParam
    )
    optimizer, _ = make_optimizer(OptimConfig(), 1, 100)

    def state_of(params: Any) -> TrainState:
        return jax.eval_shape(lambda p: TrainState(p, optimizer.init(p)), params)

    # The shapes of one microbatch of the update.
    side, channels = config.sample_size or 64, config.in_channels
    schedule = make_schedule(SchedulerConfig(), steps, eta=1.0)
    plan = plan_steps(schedule, latent_size=side * side * channels, clip_low=1e-4, clip_high=1e-4)
    shapes = jax.ShapeDtypeStruct
    latents = shapes((steps + 1, microbatch, side, side, channels), jnp.float32)
    each = shapes((microbatch,), jnp.float32)
    prompts, negative = (conditioning_shapes(config, n, 77, compute) for n in (microbatch, 1))
    batch = UpdateBatch(
        Trajectory(latents, schedule.timesteps, shapes((steps, microbatch), jnp.float32)),
        (prompts, negative),
        each,
    )
    number = shapes((), jnp.float32)
    step = shapes((), jnp.int32)

    def temporary(program: Any, *arguments: Any) -> int:
        return program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    def apply(state: TrainState, gradient: Any) -> TrainState:
        with jax.numpy_dtype_promotion("standard"):
            changes, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, c: p + c.astype(p.dtype), state.params, changes)
        return TrainState(params, opt_state)

    trained = policy.trained
    loss = compile_loss(policy.denoiser, LossConfig(microbatch=microbatch))
    arguments = (trained, trained, policy.frozen, schedule, batch, plan, number, step)
    programs = {
        "policy gradient": temporary(
            loss.accumulate, *arguments, Pulls(each, each, each), Shares(number, number)
        ),
        "optimizer": temporary(jax.jit(apply, donate_argnums=0), state_of(trained), trained),
    }
    grpo = {
        "policy parameters": size(trained) + size(policy.frozen),
        "policy gradient and optimizer state": size(trained) + size(state_of(trained).opt_state),
        "value parameters": 0,
        "value gradient and optimizer state": 0,
        "microbatch": size(batch),
        "largest temporary": max(programs.values()),
    }

    # PPO: the same policy program, and the value network's.
    graphdef, value = nnx.split(nnx.eval_shape(lambda: network(adapter=False)))

    def add_value_gradient(gradient: Any, value: Any, batch: UpdateBatch, i: Any) -> Any:
        def value_loss(value: Any) -> Any:
            x_t, t = batch.trajectory.latents[i], batch.trajectory.timesteps[i]
            times = jnp.broadcast_to(t, (microbatch,))
            output = nnx.merge(graphdef, value)(x_t, times, **batch.conditioning[0])
            predicted = output.astype(jnp.float32).mean((1, 2, 3))
            return jnp.square(predicted - batch.advantages).sum()

        return jax.tree.map(jnp.add, gradient, jax.grad(value_loss)(value))

    accumulate = jax.jit(add_value_gradient, donate_argnums=0)
    programs["value gradient"] = temporary(accumulate, value, value, batch, step)
    programs["value optimizer"] = temporary(
        jax.jit(apply, donate_argnums=0), state_of(value), value
    )
    ppo = grpo | {
        "value parameters": size(value),
        "value gradient and optimizer state": size(value) + size(state_of(value).opt_state),
        "largest temporary": max(programs.values()),
    }
    for parts in (grpo, ppo):
        parts["peak"] = sum(parts.values())
    return {"grpo": grpo, "ppo": ppo}


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("sd15", "tiny"), default="sd15")
    parser.add_argument("--trainable", choices=("full", "lora"), default="full")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--microbatch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="bytes, for programs")
    options = parser.parse_args()
    parts = compare(
        SD15 if options.size == "sd15" else TINY,
        microbatch=options.microbatch,
        steps=options.steps,
        trainable=options.trainable,
        dtype=options.dtype,
    )
    if options.json:
        print(json.dumps(parts))
        return
    print(f"{'GiB':<38}{'GRPO':>10}{'PPO':>10}")
    for name, value in parts["grpo"].items():
        other = parts["ppo"][name]
        print(f"{name:<38}{value / 2**30:>10.3f}{other / 2**30:>10.3f}")
    share = parts["grpo"]["peak"] / parts["ppo"]["peak"]
    print(f"GRPO's peak is {share:.0%} of PPO's ({jax.default_backend()})")


if __name__ == "__main__":
    main()
