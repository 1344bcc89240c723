"""Options that do not fit each other are refused with the mend, before anything is loaded."""

import re

import numpy as np
import pytest

from diffusion_grpo.config import Config, load_config
from diffusion_grpo.consistency import images_learned_from, images_sharing_a_prompt
from diffusion_grpo.errors import UsageError

STEP = ["--grpo.ratio", "step"]
NFT = ["--grpo.algorithm", "nft"]


def flags(*words):
    return [word for part in words for word in (part if isinstance(part, list) else part.split())]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # more steps than there are
        (["--grpo.gradient-steps 21"], "grpo.gradient_steps is 21, but rollout.num_steps is 20"),
        (
            ["--grpo.gradient-steps 4 --rollout.window-size 3"],
            "at most 3 steps of an iteration are learned from",
        ),
        (
            ["--grpo.gradient-steps 3 --rollout.window-size 3 --grpo.step-weights gain"],
            "expected at most 2, or None",
        ),
        (["--grpo.gradient-steps 13 --grpo.timestep-fraction 0.6"], "expected at most 12"),
        (["--rollout.window-size 21"], "expected a window within the 20 steps"),
        (["--rollout.window-size 3 --rollout.window-start 18"], "window within the 20 steps"),
        (
            ["--rollout.window-every 2"],
            "rollout.window_every is 2, but rollout.window_size is None",
        ),
        (
            ["--rollout.window-start 2"],
            "rollout.window_start is 2, but rollout.window_size is None",
        ),
        (["--rollout.num-steps 1 --grpo.step-weights gain"], "drops the last noisy step"),
        (["--rollout.window-size 1 --grpo.step-weights gain"], "drops the last noisy step"),
        # no noise, no ratio
        (["--rollout.eta 0"], "rollout.eta is 0, so no step has a density.*grpo.algorithm = 'nft'"),
        (["--rollout.eta 0", STEP], "grpo.ratio = 'step' has nothing to compare"),
        (["--rollout.eta 0 --rollout.window-size 3", NFT], "but rollout.eta is 0"),
        (
            ["--rollout.eta 0 --rollout.same-initial-noise True --eval.stochastic False", NFT],
            "all images of a prompt would be one picture",
        ),
        # weights
        (["--grpo.step-weights given"], "expected 20 numbers, one a step, not all 0"),
        (["--grpo.step-weights given --grpo.given-weights 1 2"], "expected 20 numbers"),
        (["--grpo.given-weights 1 2"], "grpo.step_weights is 'uniform'; expected 'given'"),
        (["--grpo.given-weights 1 -2"], "expected none below 0"),
        # ranges
        (["--grpo.clip-low 0"], "grpo.clip_low is 0.0; expected a number above 0"),
        (["--grpo.clip-high -1"], "grpo.clip_high is -1.0; expected a number above 0"),
        (["--grpo.clip-low 1"], "grpo.clip_low is 1.0; expected a number between 0 and 1"),
        (["--grpo.beta -0.1"], "grpo.beta is -0.1; expected 0 or more"),
        (["--grpo.dual-clip 1"], "grpo.dual_clip is 1.0; expected more than 1"),
        (["--grpo.dppo-kl 0", STEP], "grpo.dppo_kl is 0.0; expected a number above 0"),
        (["--grpo.gamma 0", STEP], "grpo.gamma is 0.0; expected a number above 0, at most 1"),
        (["--grpo.timestep-fraction 1.5"], "grpo.timestep_fraction is 1.5"),
        (["--grpo.running-min 40"], "grpo.running_min is 40; expected running_size at most"),
        (["--optim.ema-decay 1"], "optim.ema_decay is 1.0; expected a number between 0 and 1"),
        (["--optim.final-learning-rate 1e-5"], "since a constant one has no end"),
        (
            ["--optim.schedule cosine --optim.final-learning-rate 1"],
            "expected at most learning_rate, 0.0003",
        ),
        (["--nft.decay 1", NFT], "nft.decay is 1.0; expected a number from 0 to below 1"),
        # what another option leaves without effect
        (["--grpo.gamma 0.9"], "grpo.gamma is 0.9.*expected grpo.ratio = 'step'"),
        (["--grpo.guard True"], "grpo.guard is True.*expected grpo.ratio = 'step'"),
        (["--grpo.dppo-kl 0.1"], "grpo.dppo_kl is 0.1.*expected grpo.ratio = 'step'"),
        (["--grpo.dppo-kl 0.1 --grpo.dual-clip 3", STEP], "which clips no ratio"),
        (["--grpo.guard True --grpo.learn-noise-scale True", STEP], "noise of a step as fixed"),
        (["--grpo.dppo-kl 1 --grpo.learn-noise-scale True", STEP], "noise of a step as fixed"),
        # KL and its reference
        (["--grpo.kl-in reward"], "grpo.beta is 0, which leaves the KL out"),
        (["--grpo.kl-target 0.01"], "grpo.kl_target is 0.01, but grpo.beta is 0"),
        (["--grpo.kl-target 0 --grpo.beta 1"], "grpo.kl_target is 0.0; expected a number above 0"),
        (["--grpo.kl mse --grpo.beta 1"], "which is for grpo.algorithm = 'nft'"),
        (
            ["--grpo.kl-in reward --grpo.beta 1 --grpo.combine advantages"],
            "no summed reward to subtract the KL from",
        ),
        # groups
        (["--grpo.best-and-worst 5"], "a group has 8 images; expected at most 4"),
        (["--grpo.best-and-worst 3"], "8 prompts x 3 best and 3 worst = 48 images.*divisor of 48"),
        # nft
        (["--grpo.beta 0.1", NFT], "grpo.kl is 'exact'.*expected grpo.kl = 'mse'"),
        (["--nft.timesteps 21", NFT], "nft.timesteps is 21, but rollout.num_steps is 20"),
        (["--grpo.ratio step", NFT], "grpo.ratio is 'step'.*has no log-probs"),
        (["--grpo.gradient-steps 3", NFT], "grpo.gradient_steps is 3.*has no log-probs"),
        (["--grpo.learn-noise-scale True", NFT], "grpo.learn_noise_scale is True.*no log-probs"),
        (["--grpo.kl-in reward --grpo.beta 1", NFT], "grpo.kl_in is 'reward'.*no log-probs"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    extra = ["--grpo.microbatch", "32"] if "--grpo.best-and-worst 3" in words else []
    with pytest.raises(UsageError) as refused:
        load_config(None, flags(*words, extra))
    assert re.search(message, str(refused.value)), refused.value


@pytest.mark.parametrize(
    "words",
    [
        [NFT, "--rollout.eta 0"],
        [NFT, "--grpo.kl mse --grpo.beta 0.1 --grpo.kl-target 0.01"],
        [NFT, "--rollout.window-size 3"],
        [STEP, "--grpo.gamma 0.9 --grpo.guard True --grpo.dual-clip 3"],
        [STEP, "--grpo.dppo-kl 1e-3 --grpo.guard True --grpo.ratio-base reference"],
        ["--grpo.kl-in reward --grpo.beta 0.1 --grpo.kl k1 --grpo.advantage running"],
        ["--grpo.combine advantages --grpo.advantage running --grpo.best-and-worst 2"],
        ["--grpo.step-weights gain --rollout.window-size 3 --grpo.gradient-steps 2"],
        ["--rollout.num-steps 3 --grpo.step-weights given --grpo.given-weights 1 0 2.5"],
        ["--grpo.learn-noise-scale True --grpo.entropy-coeff 0.01 --grpo.ratio-base reference"],
    ],
)
def test_what_fits_is_accepted(words):
    load_config(None, flags(*words))


def test_only_the_chosen_images_are_learned_from():
    config = Config()
    assert images_learned_from(config.rollout, config.grpo) == 64
    chosen = load_config(None, ["--grpo.best-and-worst", "2"])
    assert images_learned_from(chosen.rollout, chosen.grpo) == 32


@pytest.mark.parametrize(
    ("prompts", "group", "chosen", "microbatches", "shards"),
    [
        (8, 16, 4, (32, 32), 1),  # the demo's
        (16, 8, None, (32, 32), 1),
        (8, 12, 4, (12, 16), 1),
        (8, 6, None, (8, 4), 1),
        (8, 8, 1, (32, 16), 8),
        (4, 6, 2, (24, 16), 4),
        (2, 5, None, (1, 5), 1),
    ],
)
def test_images_that_share_a_prompt_do_so_in_every_microbatch(
    prompts, group, chosen, microbatches, shards
):
    words = f"""--rollout.prompts-per-iteration {prompts} --rollout.images-per-prompt {group}
        --rollout.microbatch {microbatches[0]} --grpo.microbatch {microbatches[1]}
        --grpo.best-and-worst {chosen}"""
    config = load_config(None, words.split())

    def alike(each):
        """Whether all runs of `each` images, of every microbatch and device, have one prompt."""
        learned = 2 * chosen if chosen else group
        for size, images in zip(microbatches, (group, learned), strict=True):
            part = size // shards
            whose = np.repeat(np.arange(prompts), images).reshape(shards, -1)
            rows = [row[at : at + part] for row in whose for at in range(0, len(row), part)]
            if part % each or any(len(set(run)) > 1 for r in rows for run in r.reshape(-1, each)):
                return False
        return True

    found = images_sharing_a_prompt(config.rollout, config.grpo, shards)
    assert found == max(each for each in range(1, group + 1) if alike(each))
