"""Whether the options of a run fit each other; found before anything is loaded or compiled."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from diffusion_grpo.errors import UsageError
from diffusion_grpo.learning_sections import GRPOOptions
from diffusion_grpo.sections import RewardConfig, RolloutConfig

if TYPE_CHECKING:
    from diffusion_grpo.config import Config


def check_consistency(config: Config) -> None:
    """Check the update's options against each other and against the rollout.

    Raises:
        UsageError: P x G, or the images learned from, is no multiple of a microbatch; more steps
            asked for than there are; an option that its neighbors leave without effect.
    """
    rollout, options = config.rollout, config.grpo
    _check_microbatches(rollout, options)
    _check_window(rollout)
    if options.kl_in == "reward" and not options.beta:
        raise UsageError(
            "grpo.kl_in is 'reward', but grpo.beta is 0, which leaves the KL out; expected "
            "grpo.beta above 0, such as 0.01"
        )
    if options.kl_target is not None and not options.beta:
        raise UsageError(
            f"grpo.kl_target is {options.kl_target}, but grpo.beta is 0; expected the β to start "
            "from, above 0, since it is adapted by factors"
        )
    _check_combination(config)
    if config.eval.stochastic and not rollout.eta:
        raise UsageError(
            "eval.stochastic is True, but rollout.eta is 0: without noise there are no densities "
            "to measure a KL between; expected rollout.eta above 0, or eval.stochastic False"
        )
    if options.algorithm == "nft":
        _check_nft(config)
    else:
        _check_steps(rollout, options)
        _check_loss(options)


def images_learned_from(rollout: RolloutConfig, options: GRPOOptions) -> int:
    """Return how many images of an iteration enter the update."""
    chosen = options.best_and_worst
    return rollout.num_images if chosen is None else rollout.prompts_per_iteration * 2 * chosen


def images_sharing_a_prompt(rollout: RolloutConfig, options: GRPOOptions, shards: int) -> int:
    """Return how many consecutive images have one prompt, in every microbatch on every device.

    Images are in the order of their groups, of which sampling and update take consecutive ones.

    Args:
        rollout: G and the microbatch of sampling.
        options: the images chosen of a group, and the microbatch of the update.
        shards: devices that a microbatch is divided over.
    """
    chosen = options.best_and_worst
    learned = rollout.images_per_prompt if chosen is None else 2 * chosen
    parts = (rollout.images_at_once // shards, options.images_at_once // shards)
    return math.gcd(rollout.images_per_prompt, learned, *parts)


def _check_microbatches(rollout: RolloutConfig, options: GRPOOptions) -> None:
    each, prompts = rollout.images_per_prompt, rollout.prompts_per_iteration
    whole = f"an iteration has {prompts} prompts x {each} images = {rollout.num_images} images"
    _check_microbatch("rollout.microbatch", rollout.microbatch, rollout.num_images, whole)
    chosen = options.best_and_worst
    if chosen is not None:
        if 2 * chosen > each:
            raise UsageError(
                f"grpo.best_and_worst is {chosen}, but a group has {each} images; expected at most "
                f"{each // 2}, or None to learn from all"
            )
        images = images_learned_from(rollout, options)
        whole = f"{prompts} prompts x {chosen} best and {chosen} worst = {images} images"
    total = images_learned_from(rollout, options)
    _check_microbatch("grpo.microbatch", options.microbatch, total, whole)


def _check_microbatch(name: str, microbatch: int | None, total: int, whole: str) -> None:
    """Raise a `UsageError` unless the images divide into microbatches."""
    if microbatch is None or total % microbatch == 0:
        return
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    near = [max(size for size in divisors if size < microbatch)]
    near += [size for size in divisors if size > microbatch][:1]
    raise UsageError(
        f"{name} is {microbatch}, but {whole}; expected a divisor of {total}, the "
        f"nearest {'is' if len(near) == 1 else 'are'} {' and '.join(map(str, near))}"
    )


def _check_window(rollout: RolloutConfig) -> None:
    size, steps = rollout.window_size, rollout.num_steps
    if size is None:
        for name in ("window_start", "window_every"):
            if getattr(rollout, name):
                raise UsageError(
                    f"rollout.{name} is {getattr(rollout, name)}, but rollout.window_size is None, "
                    "so there is no window; expected its size, such as 3"
                )
    elif rollout.window_start + size > steps:
        raise UsageError(
            f"rollout.window_start is {rollout.window_start} and window_size is {size}, "
            f"but rollout.num_steps is {steps}; expected a window within the {steps} steps"
        )
    elif rollout.eta == 0:
        raise UsageError(
            f"rollout.window_size is {size}, but rollout.eta is 0, so no step has noise; expected "
            "eta above 0, or window_size None"
        )


def _check_steps(rollout: RolloutConfig, options: GRPOOptions) -> None:
    """Check that a ratio has steps with noise, and that K and the weights fit their number."""
    steps = rollout.num_steps
    if options.gradient_steps is not None and options.gradient_steps > steps:
        raise UsageError(
            f"grpo.gradient_steps is {options.gradient_steps}, but rollout.num_steps is {steps}; "
            f"expected at most {steps}, or None for all of them"
        )
    if rollout.eta == 0:
        raise UsageError(
            f"rollout.eta is 0, so no step has a density and grpo.ratio = {options.ratio!r} "
            "has nothing to compare; expected a number above 0, such as 1, or grpo.algorithm = "
            "'nft', which needs no noise"
        )
    active = rollout.window_size or steps
    given = options.given_weights
    if options.step_weights == "given":
        if len(given) != steps or not any(given):
            raise UsageError(
                f"grpo.given_weights is {given}, but rollout.num_steps is {steps}; expected "
                f"{steps} numbers, one a step, not all 0"
            )
        active = min(active, sum(weight > 0 for weight in given))
    elif given:
        raise UsageError(
            f"grpo.given_weights is {given}, but grpo.step_weights is {options.step_weights!r}; "
            "expected 'given'"
        )
    if options.step_weights == "gain":
        if active < 2:
            raise UsageError(
                f"grpo.step_weights is 'gain', which drops the last noisy step, but there is only "
                f"{active}; expected 2 steps or more, or 'uniform' weights"
            )
        active -= 1
    active = max(1, round(options.timestep_fraction * active))
    if options.gradient_steps is not None and options.gradient_steps > active:
        raise UsageError(
            f"grpo.gradient_steps is {options.gradient_steps}, but at most {active} steps of an "
            "iteration are learned from (by rollout.window_size, grpo.step_weights and "
            f"grpo.timestep_fraction); expected at most {active}, or None for all of them"
        )


def _check_loss(options: GRPOOptions) -> None:
    """Check that no option of the loss is left without effect or meaning by another."""
    per_step = {
        "gamma": options.gamma != 1,
        "guard": options.guard,
        "dppo_kl": options.dppo_kl is not None,
    }
    for name, used in per_step.items():
        if used and options.ratio != "step":
            raise UsageError(
                f"grpo.{name} is {getattr(options, name)}, which is about the ratios of single "
                f"steps, but grpo.ratio is {options.ratio!r}; expected grpo.ratio = 'step'"
            )
    for name in ("guard", "dppo_kl"):
        if per_step[name] and options.learn_noise_scale:
            raise UsageError(
                f"grpo.{name} is {getattr(options, name)}, which takes the noise of a step as "
                "fixed, but grpo.learn_noise_scale is true; expected one of the two"
            )
    if options.dppo_kl is not None and options.dual_clip is not None:
        raise UsageError(
            f"grpo.dual_clip is {options.dual_clip}, but grpo.dppo_kl is {options.dppo_kl}, which "
            "clips no ratio; expected one of the two"
        )
    if options.kl == "mse":
        raise UsageError(
            "grpo.kl is 'mse', which is for grpo.algorithm = 'nft'; expected 'exact', 'k1', 'k2', "
            "'k3' or 'flow_grpo'"
        )
    if options.kl_in == "reward" and options.combine == "advantages":
        raise UsageError(
            "grpo.kl_in is 'reward' and grpo.combine is 'advantages', which leaves no summed "
            "reward to subtract the KL from; expected grpo.kl_in = 'loss' or combine = 'rewards'"
        )


def _check_combination(config: Config) -> None:
    reward = config.reward
    if config.grpo.combine == "advantages" and reward.combine != "weighted":
        raise UsageError(
            f"reward.combine is {reward.combine!r} and grpo.combine is 'advantages', which adds "
            "up the rewards' advantages and has no use for another combination; expected "
            "reward.combine = 'weighted' or grpo.combine = 'rewards'"
        )
    if reward.pessimism != RewardConfig.pessimism and reward.combine != "ensemble":
        raise UsageError(
            f"reward.pessimism is {reward.pessimism}, but reward.combine is {reward.combine!r}, "
            "which has none; expected reward.combine = 'ensemble'"
        )


# Options of the ratio and its steps, which a loss without log-probs does not read.
_OF_RATIOS = (
    "ratio",
    "ratio_base",
    "gamma",
    "dual_clip",
    "guard",
    "dppo_kl",
    "log_prob_reduction",
    "entropy_coeff",
    "learn_noise_scale",
    "step_weights",
    "given_weights",
    "timestep_fraction",
    "gradient_steps",
    "kl_in",
)


def _check_nft(config: Config) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GRPOOptions)}
    for name in _OF_RATIOS:
        value = getattr(config.grpo, name)
        if value != defaults[name]:
            raise UsageError(
                f"grpo.{name} is {value!r}, but grpo.algorithm is 'nft', which has no log-probs "
                f"and no ratio; expected {defaults[name]!r}, or algorithm = 'grpo'"
            )
    if config.grpo.beta and config.grpo.kl != "mse":
        raise UsageError(
            f"grpo.kl is {config.grpo.kl!r}, but grpo.algorithm is 'nft', whose penalty is the "
            "squared difference of the two networks' outputs; expected grpo.kl = 'mse'"
        )
    if config.rollout.same_initial_noise and not config.rollout.eta:
        raise UsageError(
            "rollout.same_initial_noise is True, but rollout.eta is 0: all images of a prompt "
            "would be one picture, and there would be nothing to compare; expected eta above 0, "
            "or same_initial_noise False"
        )
    if config.nft.timesteps > config.rollout.num_steps:
        raise UsageError(
            f"nft.timesteps is {config.nft.timesteps}, but rollout.num_steps is "
            f"{config.rollout.num_steps}; expected at most as many, since they are drawn from the "
            "sampler's"
        )
