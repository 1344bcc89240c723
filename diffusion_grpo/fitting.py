"""What a device's memory decides: images at a time, and whether activations are recomputed.

Of `rollout.microbatch`, `grpo.microbatch` and `model.gradient_checkpointing`, what is None is
chosen by the same predictions that `diffusion-grpo plan` makes: the fastest of what fits. Nothing
is compiled or run for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_grpo.config import Config
from diffusion_grpo.consistency import images_learned_from
from diffusion_grpo.costs import Cost
from diffusion_grpo.devices import GIB, Device, device_here
from diffusion_grpo.mesh import one_device, shards, use
from diffusion_grpo.models.kernels import planned_for
from diffusion_grpo.plan import Planner
from diffusion_grpo.plan_memory import Memory
from diffusion_grpo.published import Architecture, find_architecture

SHARE = 0.75  # of a device's memory that a choice may fill; the rewards' networks are not foreseen
WITHIN = 1.05  # of the fastest: to be faster by less, no memory is taken
TRACED = 4  # images of the smaller of two programs, between which all others lie on a line


class Choice(NamedTuple):
    """One way to go.

    Attributes:
        seconds: for all images.
        bytes: taken at the worst moment.
        size: images at a time on a device.
        recompute: whether activations are recomputed.
    """

    seconds: float
    bytes: int
    size: int
    recompute: bool = False


def is_open(config: Config) -> bool:
    """Whether something is left to the device's memory."""
    sizes = (config.rollout.microbatch, config.grpo.microbatch)
    return None in (*sizes, config.model.gradient_checkpointing)


def fitted_here(config: Config, source: Path) -> tuple[Config, list[str]]:
    """Choose for the devices of the context, of which each takes its share of a microbatch.

    Args:
        config: the run's, validated.
        source: the directory of its checkpoint.

    Returns:
        As `fitted`.
    """
    if not is_open(config):
        return config, []
    count = shards()
    with use(one_device()):  # each device's program is looked at by itself
        return fitted(config, find_architecture(str(source)), device_here(), count)


def fitted(
    config: Config, model: Architecture, device: Device, count: int
) -> tuple[Config, list[str]]:
    """Choose what is None for a number of devices of a kind.

    A microbatch is a divisor of the images, and consists of whole groups or of equal parts of one.
    Of the choices that leave a quarter of the memory free, the one of least memory is taken that
    is predicted to take at most 5 % longer than the fastest; where none does, the one of least
    memory.

    Args:
        config: the run's, validated.
        model: its networks.
        device: of which kind.
        count: how many.

    Returns:
        The configuration with what was chosen, and what to tell the user of it: nothing, where
        nothing was open.
    """
    if not is_open(config):
        return config, []
    limit = SHARE * device.memory
    with planned_for(device.backend):
        config = _with_update(config, model, device, count, limit)
        config = _with_rollout(config, model, device, count, limit)
    drawn, learned = config.rollout.microbatch, config.grpo.microbatch
    kept = "recomputed" if config.model.gradient_checkpointing else "kept"
    note = (
        f"for {device.memory / GIB:.0f} GiB of memory: {drawn} images are drawn at a time and "
        f"{learned} differentiated, with activations {kept} for the backward pass"
    )
    return config, [note]


def _with_update(
    config: Config, model: Architecture, device: Device, count: int, limit: float
) -> Config:
    """Choose the images differentiated at a time, and whether activations are recomputed."""
    given, recomputes = config.grpo.microbatch, config.model.gradient_checkpointing
    if given is not None and recomputes is not None:
        return config
    images = images_learned_from(config.rollout, config.grpo) // count
    group = images // max(config.rollout.prompts_per_iteration // count, 1)
    sizes = _sizes(images, group) if given is None else [given // count]
    choices: list[Choice] = []
    for recompute in (False, True) if recomputes is None else (recomputes,):
        trial = _replaced(config, "model", gradient_checkpointing=recompute)
        planner = Planner(_whole(trial), model, device, count)
        updates = _costs(planner.update, sizes)
        memory, seconds = planner.memory({}, {}, updates), _seconds(updates, planner)
        found = [
            Choice(
                seconds(size) * _turns(images, size, memory),
                memory.updating_bytes(size),
                size,
                recompute,
            )
            for size in sizes
        ]
        choices += found
        best = _best(choices, limit)
        if best.bytes <= limit and best.seconds <= WITHIN * min(found).seconds:
            break  # what is recomputed is computed twice: no faster
    config = _replaced(config, "model", gradient_checkpointing=best.recompute)
    return _replaced(config, "grpo", microbatch=best.size * count)


def _with_rollout(
    config: Config, model: Architecture, device: Device, count: int, limit: float
) -> Config:
    """Choose the images drawn and decoded at a time, beside the gradients of the update."""
    if config.rollout.microbatch is not None:
        return config
    images = config.rollout.num_images // count
    sizes = _sizes(images, config.rollout.images_per_prompt)
    planner = Planner(_whole(config), model, device, count)
    samples, decodes = _costs(planner.sample, sizes), _costs(planner.decode, sizes)
    memory = planner.memory(samples, decodes, {})
    sampling, decoding = _seconds(samples, planner), _seconds(decodes, planner)
    learned = config.grpo.images_at_once // count
    choices = [
        Choice(
            (sampling(size) + decoding(size)) * _turns(images, size, memory),
            memory.drawing_bytes(size, learned),
            size,
        )
        for size in sizes
    ]
    return _replaced(config, "rollout", microbatch=_best(choices, limit).size * count)


def _turns(images: int, size: int, memory: Memory) -> float:
    """Return how many microbatches there are, one after another; on a CPU, cores share them."""
    return images / size / memory.lanes(images // size)


def _whole(config: Config) -> Config:
    """Return a configuration with all images at a time, so that groups are whole in a trace."""
    rollout, options = config.rollout, config.grpo
    if rollout.microbatch is None:
        config = _replaced(config, "rollout", microbatch=rollout.num_images)
    if options.microbatch is None:
        images = images_learned_from(rollout, options)
        config = _replaced(config, "grpo", microbatch=images)
    return config


def _sizes(images: int, group: int) -> list[int]:
    """Return the divisors of a number of images that are whole groups or equal parts of one."""
    divisors = [size for size in range(1, images + 1) if images % size == 0]
    return [size for size in divisors if size % group == 0 or group % size == 0]


def _costs(cost_of: Callable[[int], Cost], sizes: Sequence[int]) -> dict[int, Cost]:
    """Return the costs of two sizes, or of the only one: images at a time → cost."""
    if len(sizes) == 1:
        return {sizes[0]: cost_of(sizes[0])}
    small = max(size for size in sizes[:-1] if size <= TRACED)
    large = min(size for size in sizes if size > small)
    return {size: cost_of(size) for size in (small, large)}


def _seconds(costs: Mapping[int, Cost], planner: Planner) -> Callable[[int], float]:
    """Return images at a time → seconds of a program: a straight line through two sizes."""
    known = {size: planner.seconds(cost) for size, cost in costs.items()}
    small, large = min(known), max(known)
    slope = (known[large] - known[small]) / max(large - small, 1)
    return lambda size: known[small] + slope * (size - small)


def _best(choices: Sequence[Choice], limit: float) -> Choice:
    """Return the choice of least memory within 5 % of the fastest that fits; else of the least."""
    fit = [choice for choice in choices if choice.bytes <= limit]
    if not fit:
        return min(choices, key=lambda choice: choice.bytes)
    fastest = min(choice.seconds for choice in fit)
    near = [choice for choice in fit if choice.seconds <= WITHIN * fastest]
    return min(near, key=lambda choice: choice.bytes)


def _replaced(config: Config, section: str, **fields: object) -> Config:
    part = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **{section: part})
