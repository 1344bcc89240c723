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
from diffusion_grpo.learning import GRPOLearner, NFTLearner
from diffusion_grpo.microbatches import make_final_rollout, make_rollout
from diffusion_grpo.nft import CompiledNFT
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
    assert isinstance(learner, GRPOLearner | NFTLearner)
    state = learner.init(2)
    train, loss = state.train, learner.loss
    if isinstance(loss, CompiledNFT):
        gradient = jax.tree.map(jnp.zeros_like, train.params)
    else:
        gradient = loss.zeros(train.params)
    held = {
        "alive": each(jax.live_arrays()),
        "trained parameters": each(train.params),
        "reference": each(policy.trained),
        "gradient": each(gradient),
        "optimizer state": each((train.opt_state, train.average)),
        "old policy": each(state.old),
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
    schedule = learner.schedule(0)
    given = update_arguments(learner, policy, noise, (prompts, negative))
    if isinstance(loss, CompiledNFT):
        batch = given[5]
        leaves, structure = jax.tree.flatten(batch)
        along = structure.unflatten(
            [0 if len(x.shape) and x.shape[0] == size else None for x in leaves]
        )
        networks = train.params, state.old, policy.trained, policy.frozen
        rest = (placed(batch, along, devices), *given[6:])
    else:
        batch, pulls = given[4], given[8]
        networks = train.params, policy.frozen, schedule
        by_image = placed(pulls, jax.tree.map(lambda _: 0, pulls), devices)
        rest = (placed(batch, batch.axes(), devices), *given[5:8], by_image, given[9])
    accumulate = loss.accumulate.lower(gradient, *networks, *rest)
    rows = placed(
        (noise, keys, prompts), jax.tree.map(lambda _: 0, (noise, keys, prompts)), devices
    )
    make = make_final_rollout if isinstance(loss, CompiledNFT) else make_rollout
    draw = jax.jit(make(config, policy))
    programs = {
        "accumulate": accumulate,
        "sample": draw.lower(train.params, policy.frozen, schedule, *rows[:2], (rows[2], negative)),
    }
    if not isinstance(loss, CompiledNFT) and loss.local:
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
