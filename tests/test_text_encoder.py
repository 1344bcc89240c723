"""Adapters of the text encoders: trained with the UNet's, and what Diffusers makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file
from tiny_run import config, flags, lasting
from torch_checkpoints import TWO_LEVELS, write_family, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.conditioning import encode_prompts, prompts_at_once
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.flops import count_flops
from diffusion_grpo.lora import LoRAParam, lora_factors
from diffusion_grpo.lora_files import FILE, load_lora
from diffusion_grpo.pipeline import TrainablePolicy
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.text_encoding import TextConditionedUNet
from diffusion_grpo.train import train

PROMPTS = ["a red circle", "two blue squares"]
ENCODERS = {"sd": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "sd": write_pipeline(folder / "sd", **TWO_LEVELS),
        "sdxl": write_family(folder / "sdxl", "sdxl"),
    }


def _together(model, name, **options):
    encoders = {part: getattr(model, part) for part in ENCODERS[name]}
    return TextConditionedUNet(model.unet, encoders, **options)


@pytest.mark.parametrize("negative", ["", "a green star"])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", ENCODERS)
def test_tokens_and_their_states_are_denoised_alike(name, skip, negative, pipelines):
    model = StableDiffusion.from_pretrained(pipelines[name])
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))

    def denoised(network, **options):
        policy = TrainablePolicy(network, 4.0)
        assert policy.reads_tokens == bool(options)
        conditioning = encode_prompts(
            model, PROMPTS, negative_prompt=negative, clip_skip=skip, **options
        )
        denoise = jax.jit(lambda *arrays: policy.denoiser(*arrays[:2])(*arrays[2:]))
        return denoise(policy.trained, policy.frozen, x, jnp.int32(400), conditioning)

    states = denoised(model.unet)
    tokens = denoised(_together(model, name, clip_skip=skip), tokens=True)
    np.testing.assert_allclose(tokens, states, atol=1e-5 * float(jnp.abs(states).max()))


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("sd", False),
        ("sd", True),
        pytest.param("sdxl", False, marks=pytest.mark.slow),
        ("sdxl", True),
    ],
)
def test_the_prompt_of_a_group_is_read_once(name, tokens, pipelines):
    model = StableDiffusion.from_pretrained(pipelines[name])
    network = _together(model, name) if tokens else model.unet
    policy = TrainablePolicy(network, 4.0)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 4))
    conditioning = encode_prompts(model, [PROMPTS[i] for i in (0, 0, 0, 1, 1, 1)], tokens=tokens)

    def denoised(policy):
        def denoise(trained, frozen, x, conditioning):
            return policy.denoiser(trained, frozen)(x, jnp.int32(400), conditioning)

        arrays = policy.trained, policy.frozen, x, conditioning
        return jax.jit(denoise)(*arrays), count_flops(denoise, *arrays)

    alone, many = denoised(policy)
    grouped, few = denoised(policy.of_groups(3))
    np.testing.assert_allclose(grouped, alone, atol=1e-5 * float(jnp.abs(alone).max()))
    wrong, fewest = denoised(policy.of_groups(12))  # taken at its word: 6 images of the first
    assert fewest < few < many
    assert float(jnp.abs(wrong - alone).max()) > 1e-3 * float(jnp.abs(alone).max())


@pytest.mark.parametrize(
    ("name", "size"),
    # Bytes of a prompt: states of 16 tokens; of SDXL also the second encoder's pooled state and 6
    # size ids.
    [("sd", 4 * 16 * 24), ("sdxl", 4 * (16 * (24 + 40) + 40 + 6))],
)
def test_as_many_prompts_are_encoded_at_once_as_the_memory_for_them_holds(name, size, pipelines):
    model = StableDiffusion.from_pretrained(pipelines[name])
    assert prompts_at_once(model, budget=10 * size) == 10
    assert prompts_at_once(model, budget=10 * size - 1) == 9
    assert prompts_at_once(model, budget=1) == 1 and prompts_at_once(model) == 4096
    assert prompts_at_once(model, budget=10 * size, most=4) == 4


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_the_encoders_adapters_are_torch_s(name, pipelines, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines[name])
    written, lora = {}, {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "out_proj", "fc1"]}
    torch.manual_seed(0)
    for part in ENCODERS[name]:
        encoder = getattr(pipe, part)
        peft.inject_adapter_in_model(peft.LoraConfig(**lora), encoder)
        for parameter_name, parameter in encoder.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        written[f"{part}_lora_layers"] = get_peft_model_state_dict(encoder)
        written[f"{part}_lora_adapter_metadata"] = encoder.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, **written)

    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 2, 8, 8, 4)).astype(np.float32)
    x_torch, weights_torch = (torch.tensor(a.transpose(0, 3, 1, 2)) for a in (x, weights))
    encoded = pipe.encode_prompt(
        PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    added = None
    if name == "sdxl":
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2)
        added = {"text_embeds": encoded[2], "time_ids": sizes}
    out = pipe.unet(x_torch, torch.tensor([700, 20]), encoded[0], added_cond_kwargs=added).sample
    (out * weights_torch).sum().backward()

    model = StableDiffusion.from_pretrained(pipelines[name])
    load_lora(model, tmp_path)
    policy = TrainablePolicy(_together(model, name), 1.0, LoRAParam)
    prompts, _ = encode_prompts(model, PROMPTS, tokens=True)

    def total(trained):
        network = policy.network(trained)
        return (network(jnp.asarray(x), jnp.asarray([700, 20]), **prompts) * weights).sum()

    gradient = policy.network(jax.jit(jax.grad(total))(policy.trained))
    for part in ENCODERS[name]:
        ours = lora_factors(getattr(gradient, part))
        theirs = dict(getattr(pipe, part).named_parameters())
        assert len(ours) == sum("lora_A" in key for key in theirs) > 0
        largest = max(float(jnp.abs(g.b).max()) for g in ours.values())
        assert largest > 1e-3
        for path, (a, b, _) in ours.items():
            path = path if f"{path}.lora_A.default.weight" in theirs else path.partition(".")[2]
            for mine, letter in ((a, "A"), (b, "B")):
                # SDXL's UNet is not given the first encoder's last layer: torch leaves no gradient.
                grad = theirs[f"{path}.lora_{letter}.default.weight"].grad
                expected = np.zeros_like(mine) if grad is None else grad.numpy().T
                np.testing.assert_allclose(mine, expected, atol=2e-4 * largest)


def _run(checkpoint, folder, **changed):
    """A run that trains the adapters of all networks, by steps that are large enough to see."""
    fields = {"model__train_text_encoder": True, "optim__learning_rate": 0.05} | changed
    return config(checkpoint, folder, rollout__guidance_scale=3, **fields)


def _drawn(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    latents = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    return pipe(PROMPTS[0], latents=torch.tensor(latents), **options).images


@pytest.mark.parametrize("name", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_run_trains_them_and_diffusers_loads_what_it_exports(name, pipelines, tmp_path, capsys):
    result = train(_run(pipelines[name], tmp_path), quiet=True)
    final = result.directory / "final"
    written = load_file(final / "lora" / FILE)
    for part in ("unet", *ENCODERS[name]):
        factors = {k: v for k, v in written.items() if k.startswith(f"{part}.") and "lora_B" in k}
        assert np.median([np.abs(b).max() for b in factors.values()]) > 0.01

    tuned, base = (DiffusionPipeline.from_pretrained(p) for p in (final, pipelines[name]))
    adapted = DiffusionPipeline.from_pretrained(pipelines[name])
    adapted.load_lora_weights(final / "lora")
    plain = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        states = [p.encode_prompt(PROMPTS, **plain)[0].numpy() for p in (tuned, adapted, base)]
    assert np.abs(states[0] - states[2]).max() > 0.01
    np.testing.assert_allclose(states[0], states[1], atol=1e-4)
    images = [_drawn(p) for p in (tuned, adapted, base)]
    assert np.abs(images[0] - images[2]).max() > 0.02
    np.testing.assert_allclose(images[0], images[1], atol=2 / 255)

    run, output = str(result.directory), tmp_path / "merged"
    assert main(["export", run, "--format", "merged", "--output", str(output)]) == 2
    assert "trained the text encoders too" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_encoders_as_they_were(pipelines, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = train(_run(pipelines["sd"], tmp_path / "whole"), quiet=True)
    train(_run(pipelines["sd"], tmp_path, run__iterations=1), quiet=True)
    longer = load_config(str(tmp_path / "run" / "config.yaml"), ["--run.iterations", "2"])
    resumed = train(longer, resume=True, quiet=True)
    assert lasting(resumed.directory) == lasting(whole.directory)


def test_all_weights_of_the_unet_and_adapters_of_the_encoders_do_not_go_together(tmp_path):
    words = flags(tmp_path, tmp_path, model__train_text_encoder=True, model__trainable="full")
    with pytest.raises(UsageError, match="train_text_encoder is True; expected False with"):
        load_config(None, words)
