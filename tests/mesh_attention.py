"""Attend by the kernel for TPUs on a mesh of virtual devices, and say what came out, in JSON.

In a process of its own, since the number of devices is fixed as JAX starts. Pallas's interpreter
for one device stands in for the TPU: its interpreter of several waits for more threads than there
are. `kernels` counts those traced, `collectives` are those of the compiled programs, `errors` the
largest differences of drawing and of a gradient by shards from plain attention, `refused` what is
said of rows that the devices do not divide.
"""

import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas

from diffusion_grpo.errors import UsageError
from diffusion_grpo.mesh import AXES, by_rows, split_rows, use
from diffusion_grpo.models.kernels import attend, of_one_shard


def shards(loss: Any, q: Any, k: Any, v: Any) -> Any:
    """Return the gradient by the weight of each shard, as the update takes it."""
    of_each = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0), spmd_axis_name=AXES)
    with of_one_shard():
        return of_each(jnp.float32(1.1), *split_rows((q, k, v), (0, 0, 0)))


def main() -> None:
    """Compare."""
    count = len(jax.devices())
    mesh = jax.make_mesh(
        (count // 2, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2 * count, 256, 2, 40)) for key in keys)

    def plain(q: Any, k: Any, v: Any) -> Any:
        weights = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k) / 40**0.5, axis=-1)
        return jnp.einsum("bhnm,bmhd->bnhd", weights, v)

    def loss(attention: Any, weight: Any, q: Any, k: Any, v: Any) -> Any:
        return (attention(weight * q, k, v) ** 2).sum()

    of_each = jax.vmap(jax.grad(functools.partial(loss, plain)), in_axes=(None, 0, 0, 0))
    parts = [part.reshape(count, 2, *part.shape[1:]) for part in (q, k, v)]
    expected = plain(q, k, v), of_each(jnp.float32(1.1), *parts)

    pallas.pallas_call = functools.partial(pallas.pallas_call, interpret=True)
    errors, collectives, kernels, refused = [], set(), [], ""
    with use(mesh):
        q, k, v = by_rows((q, k, v))
        for run, right in zip(
            (attend, functools.partial(shards, functools.partial(loss, attend))),
            expected,
            strict=True,
        ):
            kernels.append(str(jax.make_jaxpr(run)(q, k, v)).count("pallas_call"))
            compiled = jax.jit(run).lower(q, k, v).compile()
            kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
            collectives |= set(re.findall(f"({kinds})[-a-z]*\\(", compiled.as_text()))
            found = compiled(q, k, v)
            errors.append(float(abs(jax.device_get(found) - jax.device_get(right)).max()))
        try:
            attend(q[:3], k[:3], v[:3])
        except UsageError as error:
            refused = str(error)
    found = {
        "refused": refused,
        "kernels": kernels,
        "errors": errors,
        "collectives": sorted(collectives),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
