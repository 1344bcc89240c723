"""A run's model as one of its checkpoints has it, for a run that did not come to its end."""

from __future__ import annotations

from pathlib import Path

import jax

from diffusion_grpo.checkpoint import Checkpoints, closed, template_of
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.mesh import make_mesh_at_hand, use
from diffusion_grpo.preparation import load_model
from diffusion_grpo.pretrained import check_layout, local_directory
from diffusion_grpo.results import export
from diffusion_grpo.train import leaves, make_policy_and_learner


def export_checkpoint(run: Path, step: int, place: Path) -> None:
    """Write the model of a run's checkpoint the way `train` writes `final/`.

    The run may be in progress: nothing in its directory is changed. It may have been on more
    devices than there are here. Its prompts and rewards need not be here.

    Args:
        run: the run's directory.
        step: the number of the checkpoint: the iterations that made it.
        place: a new folder.

    Raises:
        UsageError: the run has no such checkpoint, or it cannot be read.
    """
    config = load_config(str(run / "config.yaml"))
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UsageError(
            f"{str(run)!r} has no checkpoints/ folder: it has saved none yet; see run.save_every"
        )
    checkpoints = Checkpoints(folder, visits=True)
    with use(make_mesh_at_hand(config)), closed(checkpoints):
        if step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps)) or "none"
            raise UsageError(f"{str(run)!r} has no checkpoint {step}; expected one of: {there}")
        source = local_directory(
            config.model.pretrained, revision=config.model.revision, variant=config.model.variant
        )
        check_layout(source)
        # The last leaf is the counts of a reward's history, one a prompt, if there are histories.
        running = config.grpo.advantage == "running"
        (num_prompts,) = checkpoints.shapes(step)["leaves"][-1] if running else (0,)
        model = load_model(config, source)
        policy, learner, _ = make_policy_and_learner(config, model)
        state = learner.init(num_prompts)
        template, structure = template_of(leaves(state)), jax.tree.structure(state)
        del state  # what is read takes its place in memory
        found = checkpoints.read(step, template)
        state = jax.tree.unflatten(structure, found["leaves"])
        export(config, model, policy, state.train.evaluated, place, run=run)
