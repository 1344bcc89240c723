"""Prepare the run of `tiny_run.py` on a mesh, and print what its devices hold and send.

`python plan_run.py CHECKPOINT FOLDER FIELD=VALUE …`, in a process of its own, since the number of
virtual devices is fixed as JAX starts. The last line is JSON: bytes of each device by part, and of
the collectives' results by compiled program.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny_run
from communication import totals
from jax.sharding import NamedSharding, PartitionSpec

import diffusion_grpo.mesh as mesh
from diffusion_grpo.conditioning import conditioning_shapes
from diffusion_grpo.config import Config
from diffusion_grpo.microbatches import make_rollout
from diffusion_grpo.preparation import load_model
from diffusion_grpo.programs import update_arguments
from diffusion_grpo.train import make_policy_and_learner


def each(tree: Any) -> int:
    """Return the bytes of a tree's arrays on each device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def placed(tree: Any, axes: Any, devices: Any) -> Any:
    """Return shapes divided over the devices along the axis of their images; arrays as they are."""

    def one(x: Any, axis: int | None) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        spec = PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, mesh.AXES)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(devices, spec))

    leaves, structure = jax.tree.flatten(tree)
    along = structure.flatten_up_to(axes)
    return structure.unflatten([one(x, axis) for x, axis in zip(leaves, along, strict=True)])


def found(config: Config, checkpoint: Path, devices: Any) -> dict[str, Any]:
    """Prepare as `train` does, and compile the programs of the rollout and the update."""
    model = load_model(config, checkpoint)
    for network in (model.text_encoder, model.vae):
        mesh.place_module(network, mesh.replicated)
    policy, learner, shape = make_policy_and_learner(config, model)
    train = learner.init(2).train
    loss = learner.loss  # pyright: ignore[reportAttributeAccessIssue]  GRPO's
    gradient = loss.zeros(train.params)
    held = {
        "alive": each(jax.live_arrays()),
        "trained parameters": each(train.params),
        "reference": each(policy.trained),
        "gradient": each(gradient),
        "optimizer state": each((train.opt_state, train.average)),
    }
    size = config.grpo.microbatch
    noise, keys = (
        jax.ShapeDtypeStruct((size, *shape), jnp.float32),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size)),
    )
    prompts, negative = (
        conditioning_shapes(model.unet.config, count, 8, jnp.float32, encoders=0)
        for count in (size, 1)
    )
    given = update_arguments(learner, policy, noise, (prompts, negative))  # pyright: ignore
    schedule, batch, pulls = given[3], given[4], given[8]
    accumulate = loss.accumulate.lower(
        gradient,
        train.params,
        policy.frozen,
        schedule,
        placed(batch, batch.axes(), devices),
        *given[5:8],
        placed(pulls, jax.tree.map(lambda _: 0, pulls), devices),
        given[9],
    )
    rows = placed(
        (noise, keys, prompts), jax.tree.map(lambda _: 0, (noise, keys, prompts)), devices
    )
    draw = jax.jit(make_rollout(config, policy))
    programs = {
        "accumulate": accumulate,
        "sample": draw.lower(train.params, policy.frozen, schedule, *rows[:2], (rows[2], negative)),
    }
    if loss.local:
        programs["total"] = mesh._total_of.lower(gradient)
    sent = {name: totals(program.compile().as_text()) for name, program in programs.items()}
    return held | {"total": {}} | sent


if __name__ == "__main__":
    checkpoint, folder, *changed = sys.argv[1:]
    fields = dict(word.split("=", 1) for word in changed)
    config = tiny_run.config(Path(checkpoint), Path(folder), **fields)
    devices = mesh.make_mesh(config)
    with mesh.use(devices):
        print(json.dumps(found(config, Path(checkpoint), devices)))
