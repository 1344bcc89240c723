import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.evaluate import make_trajectory_kl
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.schedule import SchedulerConfig, make_schedule


class Constant(nnx.Module):
    """Predicts the same noise everywhere."""

    def __init__(self, value):
        self.value = nnx.Param(jnp.float32(value))

    def __call__(self, sample, timesteps, encoder_hidden_states):
        return jnp.broadcast_to(self.value[...], sample.shape)


@pytest.mark.parametrize(("reduction", "elements"), [("mean", 1), ("sum", 12)])
def test_kl_of_two_constant_predictions_is_the_closed_form(reduction, elements):
    config = SchedulerConfig.from_dict({"beta_schedule": "scaled_linear", "clip_sample": False})
    steps = 5
    schedule = make_schedule(config, steps, eta=1.0)
    # Ho et al. 2020, eq. 12, in float64: Σ β̃-weighted squared error of the noise prediction
    betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000) ** 2
    table = np.cumprod(1 - betas)
    expected = 0.0
    for t in np.arange(steps)[::-1] * (1000 // steps):
        now, then = table[t], table[t - 200] if t >= 200 else 1.0
        variance = (1 - then) / (1 - now) * (1 - now / then)
        if variance == 0:
            continue
        # μ = √ᾱ_s (x − √(1−ᾱ_t) ε)/√ᾱ_t + √(1−ᾱ_s−σ²) ε, so ∂μ/∂ε is
        slope = np.sqrt(1 - then - variance) - np.sqrt(then * (1 - now) / now)
        expected += (slope * (0.3 - 0.1)) ** 2 / (2 * variance)
    policy, base = (TrainablePolicy(Constant(value), 1.0) for value in (0.3, 0.1))
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(jax.random.key(1), (3, 2, 2, 3))
    conditioning = tuple({"encoder_hidden_states": jnp.zeros((n, 1, 1))} for n in (3, 1))
    measure = make_trajectory_kl(policy, schedule, reduction, base)
    found = measure(policy.trained, noise, keys, conditioning)
    # float32 means differ by little at the last steps, where σ is small
    np.testing.assert_allclose(found, np.full(3, elements * expected), rtol=5e-4)
    own = make_trajectory_kl(policy, schedule, reduction)
    np.testing.assert_array_equal(own(policy.trained, noise, keys, conditioning), np.zeros(3))


def scaled(checkpoint, folder, file, endings):
    """Copy a pipeline with some of its tensors doubled."""
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / file)
    chosen = [name for name in tensors if name.endswith(endings)]
    assert chosen
    save_file(tensors | {name: 2 * tensors[name] for name in chosen}, folder / file)
    return folder


@pytest.mark.slow
def test_kl_to_a_base_counts_what_its_text_encoder_does(tmp_path):
    """Text states twice as large are what keys and values of twice the size make of them."""
    checkpoint = write_pipeline(tmp_path / "pipeline", **TWO_LEVELS)
    layer_norm = ("final_layer_norm.weight", "final_layer_norm.bias")
    keys_and_values = ("attn2.to_k.weight", "attn2.to_v.weight")
    bases = {
        "text": scaled(checkpoint, tmp_path / "text", "text_encoder/model.safetensors", layer_norm),
        "unet": scaled(
            checkpoint,
            tmp_path / "unet",
            "unet/diffusion_pytorch_model.safetensors",
            keys_and_values,
        ),
    }
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    words = ["--reward", "jpeg_size", "--prompts", tmp_path / "prompts.txt", "--num-steps", 3]
    words += ["--samplers", "ddim", "--num-images", 1, "--output", tmp_path / "kl.json", "--quiet"]

    def kl(model, base):
        assert main([str(word) for word in ["evaluate", model, "--base", base, *words]]) == 0
        found = json.loads((tmp_path / "kl.json").read_text())["samplers"]
        return found["ddim"]["metrics"]["kl"]

    by_unet = kl(checkpoint, bases["unet"])
    assert by_unet > 1e-6
    np.testing.assert_allclose(kl(checkpoint, bases["text"]), by_unet, rtol=1e-4)
    assert kl(bases["text"], bases["unet"]) < 1e-6 * by_unet
