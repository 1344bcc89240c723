"""Prepare the policy of `tiny_run.py` on a mesh, and write down how much memory it takes.

`python mesh_memory.py CHECKPOINT FOLDER FIELD=VALUE …`, in a process of its own, since the number
of virtual devices is fixed as JAX starts. Prints, in JSON, the bytes of a device that are `live`,
and those of them that are `used`: by the policy and by the networks that are no part of it.
"""

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from tiny_run import config

from diffusion_grpo.mesh import make_mesh, place_module, replicated, use
from diffusion_grpo.preparation import load_model
from diffusion_grpo.train import make_policy_and_learner


def of_a_device(arrays: list[Any]) -> int:
    """Return the bytes of arrays on the first device; the shards themselves are not touched."""
    first = jax.devices()[0]
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in arrays
        if isinstance(x, jax.Array) and first in x.sharding.device_set
    )


def main(checkpoint: str, folder: str, *changed: str) -> None:
    """Prepare and measure."""
    fields = dict(word.split("=", 1) for word in changed)
    settings = config(Path(checkpoint), Path(folder), **fields)
    with use(make_mesh(settings)):
        model = load_model(settings, Path(checkpoint))
        for network in (model.text_encoder, model.vae):
            place_module(network, replicated)
        policy, _, _ = make_policy_and_learner(settings, model)
        gc.collect()
        others: list[nnx.Module] = [model.vae]
        if not policy.reads_tokens:
            others.append(model.text_encoder)
        used = [policy.trained, policy.frozen, *map(nnx.state, others)]
        live = of_a_device(jax.live_arrays())
        print(json.dumps({"live": live, "used": of_a_device(jax.tree.leaves(used))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
