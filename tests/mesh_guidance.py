"""Denoise with guidance on a mesh of virtual devices, and print what is sent for it, in JSON.

In a process of its own, since the number of devices is fixed as JAX starts. `collectives` are
those of the compiled program; `error` is the largest difference from two calls of the network.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_grpo.mesh import AXES, by_rows, use
from diffusion_grpo.rollout import guided


def network(x: Any, timesteps: Any, prompts: Any) -> Any:
    """Mix pixels and channels of each image, and its prompt's."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
    mixed = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    of_each = jnp.repeat(prompts, len(x) // len(prompts), axis=0)
    return jnp.tanh(mixed + (timesteps[:, None] * of_each)[:, None, None])


def main() -> None:
    """Compare."""
    count = len(jax.devices())
    mesh = jax.make_mesh(
        (count // 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )
    keys = jax.random.split(jax.random.key(1), 3)
    x = jax.random.normal(keys[0], (4 * count, 8, 8, 4))
    prompts = jax.random.normal(keys[1], (2 * count, 4))
    negative = jax.random.normal(keys[2], (1, 4))
    timesteps = jnp.full(len(x), 3)
    conditional = network(x, timesteps, prompts)
    unconditional = network(x, timesteps, negative)
    expected = jax.device_get(unconditional + 5.0 * (conditional - unconditional))
    with use(mesh):
        x, prompts = by_rows((x, prompts))
        denoise = jax.jit(lambda *arguments: by_rows(guided(network, 5.0)(*arguments)))
        compiled = denoise.lower(x, jnp.int32(3), (prompts, negative)).compile()
        error = abs(jax.device_get(compiled(x, jnp.int32(3), (prompts, negative))) - expected).max()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = sorted(set(re.findall(f"({kinds})[-a-z]*\\(", compiled.as_text())))
    print(json.dumps({"collectives": found, "error": float(error)}))


if __name__ == "__main__":
    main()
