"""Small pipelines of each family, written by Diffusers with random weights, from end to end."""

import dataclasses
import json
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from families import PUBLISHED, ZERO_SNR
from safetensors.numpy import load_file
from torch_checkpoints import write_family

from diffusion_grpo.conditioning import encode_prompts
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.pipeline import generate
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.train import train

PROMPTS = ["a red circle", "two blue squares"]
NEGATIVE = "a green star"
SCHEDULERS = {"sd21": ZERO_SNR}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {
        name: write_family(folder / name, name, **SCHEDULERS.get(name, {})) for name in PUBLISHED
    }


def _diffusers(directory):
    pipe = DiffusionPipeline.from_pretrained(directory)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", PUBLISHED)
def test_image_is_that_of_diffusers(name, pipelines):
    latents = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(np.float32)
    pipe = _diffusers(pipelines[name])

    def expected(negative):
        options = {"num_inference_steps": 4, "guidance_scale": 8.0, "output_type": "np"}
        given = {"negative_prompt": negative, "latents": torch.tensor(latents)}
        return 255 * pipe(PROMPTS, **given, **options).images

    ours = generate(
        StableDiffusion.from_pretrained(pipelines[name]),
        PROMPTS,
        num_steps=4,
        guidance_scale=8.0,
        negative_prompt=NEGATIVE,
        latents=jnp.asarray(latents.transpose(0, 2, 3, 1)),
    )
    theirs = expected([NEGATIVE] * 2)
    assert np.abs(ours - theirs).max() <= 2
    # The comparison says something: there is contrast, and the negative prompt is seen.
    assert theirs.std() > 10
    assert np.abs(theirs - expected(None)).max() > 5


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ("cat", {}, "prompts is 'cat'; expected a list of texts, one an image"),
        ([], {}, r"prompts is \[\]; expected a list"),
        (PROMPTS, {"image_index": [0]}, "image_index has 1 entries for 2 prompts"),
        (PROMPTS, {"prompt_index": [0, 1, 2]}, "prompt_index has 3 entries for 2 prompts"),
        # JAX takes the last row for those past it: all images would begin with one noise.
        (PROMPTS, {"latents": jnp.zeros((1, 8, 8, 4))}, r"\(1, 8, 8, 4\); expected \(2, h, w, 4\)"),
        (PROMPTS, {"latents": jnp.zeros((2, 4, 8, 8))}, r"\(2, 4, 8, 8\); .* channels last"),
        (PROMPTS, {"batch_size": 0}, "batch_size is 0; expected 1 or more"),
    ],
)
def test_what_has_not_one_entry_a_prompt_is_refused(prompts, arguments, message, pipelines):
    model = StableDiffusion.from_pretrained(pipelines["sd15"])
    with pytest.raises(UsageError, match=message):
        generate(model, prompts, num_steps=1, **arguments)
    if prompts == "cat":
        with pytest.raises(UsageError, match="texts is 'cat'; expected a list of texts"):
            encode_prompts(model, prompts)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("name", PUBLISHED)
def test_conditioning_is_that_of_diffusers(name, skip, negative, pipelines):
    pipe = _diffusers(pipelines[name])
    # Transformers 5 took away the attribute that Diffusers reads the final norm from.
    pipe.text_encoder.__dict__.setdefault("text_model", pipe.text_encoder)
    words = {"negative_prompt": [negative] * 2 if negative else None, "clip_skip": skip or None}
    with torch.no_grad():
        expected = pipe.encode_prompt(
            PROMPTS,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            **words,
        )
    model = StableDiffusion.from_pretrained(pipelines[name])
    prompts, negatives = encode_prompts(
        model, PROMPTS, negative_prompt=negative, shape=(8, 6, 4), clip_skip=skip
    )
    found = [prompts["encoder_hidden_states"], negatives["encoder_hidden_states"]]
    if name == "sdxl":
        found += [prompts["text_embeds"], negatives["text_embeds"]]
        ids = [[64, 48, 0, 0, 64, 48]]
        np.testing.assert_array_equal(prompts["time_ids"], ids * 2)
        np.testing.assert_array_equal(negatives["time_ids"], ids)
    for ours, theirs in zip(found, expected, strict=True):
        given = theirs.numpy()[: len(ours)]
        np.testing.assert_allclose(ours, given, atol=1e-4 * max(1.0, np.abs(given).max()))


def test_prompts_that_are_too_long_are_cut_with_one_warning(pipelines):
    model = StableDiffusion.from_pretrained(pipelines["sdxl"])
    long = "red circle " * 20
    with pytest.warns(UserWarning, match="42 tokens is cut to the 16.*red circle") as caught:
        prompts, _ = encode_prompts(model, [long, "red circle " * 7, "blue " * 30])
    assert len(caught) == 1
    rows = prompts["encoder_hidden_states"]
    np.testing.assert_array_equal(rows[0], rows[1])  # the same 14 words between start and end


def test_clip_skip_beyond_the_layers_is_refused(pipelines):
    model = StableDiffusion.from_pretrained(pipelines["sdxl"])
    with pytest.raises(UsageError, match="clip_skip is 2, but .* 3 layers; expected at most 1"):
        encode_prompts(model, PROMPTS, clip_skip=2)


def test_components_that_do_not_belong_together_are_refused(pipelines, tmp_path):
    directory = shutil.copytree(pipelines["sdxl"], tmp_path / "copy")
    index = json.loads((directory / "model_index.json").read_text())
    config = json.loads((directory / "unet" / "config.json").read_text())
    (directory / "unet" / "config.json").write_text(json.dumps(config | {"cross_attention_dim": 9}))
    with pytest.raises(UsageError, match="cross_attention_dim is 9, but its 2 text encoder.* 64"):
        StableDiffusion.from_pretrained(directory)
    changed = config | {"projection_class_embeddings_input_dim": 80}
    (directory / "unet" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="input_dim is 80, .* 6 size ids give 88"):
        StableDiffusion.from_pretrained(directory)
    lone = index | {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    (directory / "model_index.json").write_text(json.dumps(lone))
    config["cross_attention_dim"] = 24
    (directory / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="needs the projected output of a text_encoder_2"):
        StableDiffusion.from_pretrained(directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_one_iteration_of_training(name, pipelines, tmp_path):
    words = f"""--model {pipelines[name]} --prompts.train counting --prompts.heldout counting
        --reward.rewards brightness --rollout.prompts-per-iteration 1 --rollout.images-per-prompt 2
        --rollout.num-steps 2 --rollout.microbatch 2 --grpo.microbatch 2 --eval.num-prompts 1
        --eval.num-steps 1 --run.iterations 1 --grpo.updates-per-rollout 1
        --rollout.negative-prompt blurry --run.output {tmp_path / "run"}"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a prompt of .* tokens is cut")
        result = train(load_config(None, words.split()), quiet=True)
    final = result.directory / "final"
    before, after = (load_file(folder / UNET) for folder in (pipelines[name], final))
    changed = {key for key in before if (before[key] != after[key]).any()}
    assert changed and all(".to_" in key for key in changed)
    pipe = _diffusers(final)  # Diffusers reads what was written, and draws the same picture
    latents = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "np"}
    theirs = 255 * pipe(PROMPTS[0], latents=torch.tensor(latents), **options).images
    ours = generate(
        dataclasses.replace(StableDiffusion.from_pretrained(final), sampling=None),
        PROMPTS[:1],
        num_steps=1,
        guidance_scale=3.0,
        latents=jnp.asarray(latents.transpose(0, 2, 3, 1)),
    )
    assert np.abs(ours - theirs).max() <= 2
