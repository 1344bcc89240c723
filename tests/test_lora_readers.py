"""Adapters of text encoders, of convolutions, and by Stability's names, against PyTorch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from diffusers.utils import convert_state_dict_to_diffusers
from diffusers.utils.state_dict_utils import DIFFUSERS_OLD_TO_PEFT
from families import PUBLISHED
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from torch_checkpoints import TOKENS, TWO_LEVELS, WIDTH, write_family, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.conditioning import encode_prompts
from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora_files import FILE, load_lora, original_name, read_lora
from diffusion_grpo.models.unet import UNetConfig
from diffusion_grpo.pretrained import StableDiffusion

PROMPTS = ["a red circle", "two blue squares"]
ENCODERS = ("text_encoder", "text_encoder_2")
LAYERS = ("q_proj", "out_proj", "fc1")
OPTIONS = {"r": 2, "lora_alpha": 6, "target_modules": list(LAYERS)}


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("readers") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("readers") / "pipeline", **TWO_LEVELS)


def _encoded(pipe):
    """The hidden states and the pooled embedding that Diffusers' pipeline has of the prompts."""
    with torch.no_grad():
        found = pipe.encode_prompt(
            PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return found[0].numpy(), found[2].numpy()


def _assert_encodes_like(pipe, base, file):
    """Our text encoders with the adapters of a file give what Diffusers' pipeline does."""
    model = StableDiffusion.from_pretrained(base)
    load_lora(model, file)
    ours, _ = encode_prompts(model, PROMPTS)
    hidden, pooled = _encoded(pipe)
    untouched, _ = _encoded(StableDiffusionXLPipeline.from_pretrained(base))
    assert np.abs(hidden - untouched).max() > 0.1
    size = 1e-4 * np.abs(hidden).max()
    np.testing.assert_allclose(ours["encoder_hidden_states"], hidden, atol=size)
    np.testing.assert_allclose(ours["text_embeds"], pooled, atol=1e-4 * np.abs(pooled).max())


def _inject(encoder):
    """Give a text encoder an adapter by PEFT, with random factors."""
    peft.inject_adapter_in_model(peft.LoraConfig(**OPTIONS), encoder)
    _randomize(encoder)


def _randomize(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def test_text_encoders_adapters_that_diffusers_writes_are_read(sdxl, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    written = {}
    for part in ENCODERS:
        encoder = getattr(pipe, part)
        _inject(encoder)
        written[f"{part}_lora_layers"] = get_peft_model_state_dict(encoder)
        config = encoder.peft_config["default"].to_dict()
        written[f"{part}_lora_adapter_metadata"] = config
    pipe.save_lora_weights(tmp_path, **written)
    _assert_encodes_like(pipe, sdxl, tmp_path)


def _of_transformers_4(tensors):
    return {f"text_model.{key.removeprefix('text_model.')}": x for key, x in tensors.items()}


def _of_older_diffusers(tensors):
    """Diffusers' own table of its older names, turned around."""
    renamed = {}
    for key, x in _of_transformers_4(tensors).items():
        old, new = next(pair for pair in DIFFUSERS_OLD_TO_PEFT.items() if pair[1] in key)
        renamed[key.replace(new, old)] = x
    return renamed


SCRIPTS = {
    "today": convert_state_dict_to_diffusers,
    "transformers-4": lambda tensors: convert_state_dict_to_diffusers(_of_transformers_4(tensors)),
    "older": _of_older_diffusers,
}


@pytest.mark.parametrize("names", SCRIPTS)
def test_text_encoders_adapters_of_diffusers_training_scripts_are_read(names, sdxl, tmp_path):
    pipe, written = StableDiffusionXLPipeline.from_pretrained(sdxl), {}
    for part in ENCODERS:
        _inject(getattr(pipe, part))
        tensors = get_peft_model_state_dict(getattr(pipe, part))
        written[f"{part}_lora_layers"] = SCRIPTS[names](tensors)
    pipe.save_lora_weights(tmp_path, **written)
    names_of_q = "self_attn.to_q_lora" if names == "older" else "self_attn.q_proj.lora_linear_layer"
    for part in ENCODERS:
        pattern = rf"{part}\..*\.{re.escape(names_of_q)}\.down\.weight"
        assert any(re.fullmatch(pattern, key) for key in load_file(tmp_path / FILE))
    loaded = StableDiffusionXLPipeline.from_pretrained(sdxl)
    loaded.load_lora_weights(tmp_path)
    _assert_encodes_like(loaded, sdxl, tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_text_encoder_s_adapter_that_peft_writes_is_read(sdxl, tmp_path):
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    adapted = peft.get_peft_model(pipe.text_encoder, peft.LoraConfig(**OPTIONS))
    _randomize(adapted)
    adapted.save_pretrained(tmp_path)
    pipe.text_encoder = adapted.base_model.model
    _assert_encodes_like(pipe, sdxl, tmp_path)


def _add_kohya(module, prefix, chosen, tensors):
    """Add a random adapter to torch layers, and its tensors as kohya's scripts name them.

    W + (α/r) up ∘ down, of a convolution with down in the layer's window and up 1x1.
    """
    rng, rank, alpha = np.random.default_rng(0), 3, 2.0
    for name, layer in module.named_modules():
        if not (isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and chosen(name)):
            continue
        out, inputs, *window = layer.weight.shape
        down = rng.normal(size=(rank, inputs, *window)).astype(np.float32)
        up = 0.2 * rng.normal(size=(out, rank, *[1 for _ in window])).astype(np.float32)
        change = np.einsum("or,ri...->oi...", up.reshape(out, rank), down)
        with torch.no_grad():
            layer.weight += alpha / rank * torch.tensor(change)
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up.astype(np.float32)}
        tensors[f"{key}.alpha"] = np.asarray(alpha, np.float32)


def test_text_encoders_adapters_of_kohya_s_scripts_are_read(sdxl, tmp_path):
    pipe, tensors = StableDiffusionXLPipeline.from_pretrained(sdxl), {}
    for part, prefix in zip(ENCODERS, ("lora_te1_", "lora_te2_"), strict=True):
        found = {}
        module = getattr(pipe, part)
        _add_kohya(module, prefix, lambda name: name.endswith(LAYERS), found)
        # Those scripts know the layers by Transformers 4's names, all under `text_model`.
        for key, value in found.items():
            layer = key.removeprefix(prefix).removeprefix("text_model_")
            tensors[f"{prefix}text_model_{layer}"] = value
    save_file(tensors, tmp_path / "kohya.safetensors")
    _assert_encodes_like(pipe, sdxl, tmp_path / "kohya.safetensors")


def test_adapted_convolutions_of_kohya_s_scripts_give_torch_s_output(checkpoint, tmp_path):
    unet, tensors = UNet2DConditionModel.from_pretrained(checkpoint / "unet"), {}
    ends = ("to_k", "net.2", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "conv")
    _add_kohya(unet, "lora_unet_", lambda name: name.endswith(ends), tensors)
    assert {value.shape[2:] for value in tensors.values()} == {(), (1, 1), (3, 3)}
    save_file(tensors, tmp_path / "kohya.safetensors")
    model = StableDiffusion.from_pretrained(checkpoint)
    load_lora(model, tmp_path / "kohya.safetensors")
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    states = rng.normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        given = (torch.tensor(sample), torch.tensor([700, 20]), torch.tensor(states))
        expected = unet(*given).sample.numpy().transpose(0, 2, 3, 1)
    inputs = (jnp.asarray(sample.transpose(0, 2, 3, 1)), jnp.asarray([700, 20]))
    found = jax.jit(lambda unet, *given: unet(*given))(model.unet, *inputs, jnp.asarray(states))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", PUBLISHED)
def test_original_names_are_those_that_diffusers_converts_from(name):
    fields = PUBLISHED[name].unet
    with torch.device("meta"):
        unet = UNet2DConditionModel(**fields)
    config = UNetConfig.from_dict(dict(unet.config))
    given, expected = {}, {}
    for path, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            for kind, _ in layer.named_parameters():
                # Each tensor's value says which layer it belongs to.
                given[f"model.diffusion_model.{original_name(path, config)}.{kind}"] = path
                expected[f"{path}.{kind}"] = path
    assert len(given) == len(expected) > 300
    assert convert_ldm_unet_checkpoint(given, dict(unet.config)) == expected


def test_what_does_not_fit_is_told_with_the_file(checkpoint, tmp_path, capsys):
    path = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    file = tmp_path / "other.safetensors"
    factors = {"down": np.ones((2, 5), np.float32), "up": np.ones((5, 2), np.float32)}
    save_file({f"{path}.lora_{k}.weight": v for k, v in factors.items()}, file)
    model = StableDiffusion.from_pretrained(checkpoint)
    with pytest.raises(UsageError, match=r"other.safetensors.*attn1.to_q.*\(5, 2\).*\(16, 2\)"):
        load_lora(model, file)
    save_file({f"{path}.lora_down.weight": factors["down"]}, file)
    with pytest.raises(UsageError, match=r"other.safetensors.*both factors"):
        read_lora(file, model)
    save_file({"lora_unet_nowhere.lora_down.weight": factors["down"]}, file)
    words = ["--model", str(checkpoint), "--prompt", "a", "--lora", str(file)]
    assert main(["sample", *words]) == 2
    assert "'nowhere' of the unet" in capsys.readouterr().err
