"""Adapters in files: Diffusers with PEFT loads ours, and theirs and kohya's are read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_state_dict_to_kohya
from flax import nnx
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.numpy import load_file, save_file
from torch_checkpoints import write_family

from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora import Factors, attach_lora, lora_factors
from diffusion_grpo.lora_files import FILE, _scale, of_kohya, original_name, read_lora, write_lora
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.tensor_files import open_file, write_file

TARGETS = ("to_q", r"to_out\.0", r"resnets\.\d+\.conv1", r"\w+samplers\.0\.conv", "proj_in")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("lora") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def model(sdxl):
    return StableDiffusion.from_pretrained(sdxl)


@pytest.fixture(scope="module")
def factors(sdxl):
    unet = StableDiffusion.from_pretrained(sdxl).unet
    attach_lora(unet, TARGETS, rank=3, alpha=6.0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    return {
        path: Factors(f.a, jnp.asarray(rng.normal(size=f.b.shape), jnp.float32), f.scale)
        for path, f in lora_factors(unet).items()
    }


def _delta(factors):
    """(α/r) B A of a layer, by NumPy, in the layer's layout."""
    a, b = (np.asarray(x, np.float64) for x in factors[:2])
    return factors.scale * np.einsum("...ir,ro->...io", a, b.reshape(b.shape[-2:]))


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(_delta(found[path]), _delta(expected[path]), atol=1e-5)


def test_what_is_written_diffusers_adds_to_the_right_layers(factors, sdxl, tmp_path):
    write_lora({"unet": factors}, tmp_path / FILE)
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        change = (after[name] - before[name]).numpy()
        path = name.removesuffix(".weight")
        if path in factors:
            delta = _delta(factors[path])
            delta = delta.T if delta.ndim == 2 else delta.transpose(3, 2, 0, 1)
            np.testing.assert_allclose(change, delta, atol=1e-5)
        else:
            assert not change.any(), name


def test_what_is_written_is_read(factors, model, tmp_path):
    write_lora({"unet": factors}, tmp_path / FILE)
    _assert_same(read_lora(tmp_path, model)["unet"], factors)


PATTERN = r".*\.(to_q|to_out\.0|conv1|proj_in)"


def _fused(pipe):
    """What Diffusers adds to the UNet's layers by the adapters it has loaded, [out, in, …]."""
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    names = {name: name.replace(".base_layer", "") for name in before if "lora_" not in name}
    changes = {
        new.removesuffix(".weight"): (after[new] - before[old]).numpy()
        for old, new in names.items()
    }
    return {path: change for path, change in changes.items() if change.any()}


def _assert_adds(found, expected):
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        delta = _delta(found[path])
        delta = delta.T if delta.ndim == 2 else delta.transpose(3, 2, 0, 1)
        np.testing.assert_allclose(delta, change, atol=1e-5)


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_what_peft_and_diffusers_write_is_read(rank_stabilized, sdxl, model, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    options = {"r": 4, "lora_alpha": 6, "use_rslora": rank_stabilized}
    pipe.unet.add_adapter(LoraConfig(**options, target_modules=PATTERN))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    found = read_lora(tmp_path, model)
    assert found.keys() == {"unet"}
    _assert_adds(found["unet"], _fused(pipe))


@pytest.mark.parametrize("blocks", ["diffusers", "original"])
def test_what_kohya_s_scripts_write_is_read(blocks, factors, sdxl, model, tmp_path):
    tensors, alpha = {}, np.float32(5)
    for path, (a, b, _) in factors.items():
        if ".attn" not in path:
            continue  # as those scripts train by default
        name = original_name(path, model.unet.config) if blocks == "original" else path
        layer = "lora_unet_" + name.replace(".", "_")
        tensors[f"{layer}.lora_down.weight"] = np.ascontiguousarray(np.asarray(a).T)
        tensors[f"{layer}.lora_up.weight"] = np.ascontiguousarray(np.asarray(b).T)
        tensors[f"{layer}.alpha"] = np.asarray(alpha)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    found = read_lora(file, model)["unet"]
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(file)  # its own table of the names
    _assert_adds(found, _fused(pipe))
    assert len(found) == len(tensors) / 3 > 4


def test_what_is_written_by_kohya_s_names_diffusers_adds_to_the_right_layers(
    factors, sdxl, model, tmp_path
):
    write_lora({"unet": factors}, tmp_path / FILE)
    file = tmp_path / "kohya.safetensors"
    write_file(of_kohya(open_file(tmp_path / FILE), model.unet.config).entries, file)
    names = load_file(file).keys()
    # With one residual block a level: conv_in, resnet, down, resnet with attention; twice up.
    layers = ("input_blocks_3_1_transformer_blocks_0_attn1_to_q", "output_blocks_1_2_conv")
    assert {f"lora_unet_{layer}.alpha" for layer in layers} <= names
    assert not any("_blocks_0_attentions" in name for name in names)
    _assert_same(read_lora(file, model)["unet"], factors)
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(file)  # its own table of the names
    _assert_adds(factors, _fused(pipe))


def test_text_encoders_have_kohya_s_names_as_diffusers_gives_them(sdxl, model, tmp_path):
    written = {}
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(StableDiffusion.from_pretrained(sdxl), part)
        attach_lora(encoder, ("q_proj", "fc1"), rank=2, alpha=2.0, rngs=nnx.Rngs(0))
        written[part] = lora_factors(encoder)
    write_lora(written, tmp_path / FILE)
    ours = of_kohya(open_file(tmp_path / FILE), model.unet.config)
    tensors = {name: torch.tensor(x) for name, x in load_file(tmp_path / FILE).items()}
    theirs = convert_state_dict_to_kohya(tensors)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.numpy())
    assert {"lora_te1", "lora_te2"} == {name.partition("_text_model")[0] for name in ours}


def _kohya(factors, name_of, scale):
    """Tensors as kohya's scripts name them, of the layers of attention."""
    tensors = {}
    for path, (a, b, _) in factors.items():
        if ".attn" in path:
            layer = "lora_unet_" + name_of(path).replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = np.ascontiguousarray(np.asarray(a).T)
            tensors[f"{layer}.lora_up.weight"] = np.ascontiguousarray(scale * np.asarray(b).T)
    return tensors


def test_of_blocks_that_are_named_in_both_ways_one_set_is_read_as_in_diffusers(
    factors, sdxl, model, tmp_path
):
    originals = _kohya(factors, lambda path: original_name(path, model.unet.config), 3)
    file = tmp_path / "both.safetensors"
    save_file(originals | _kohya(factors, lambda path: path, 1), file)
    found = read_lora(file, model)["unet"]
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(file)
    _assert_adds(found, _fused(pipe))


def test_two_adapters_of_a_layer_in_one_file_are_refused(factors, model, tmp_path):
    write_lora({"unet": factors}, tmp_path / FILE)
    other = _kohya(factors, lambda path: path, 1)
    save_file(load_file(tmp_path / FILE) | other, tmp_path / FILE)
    with pytest.raises(UsageError, match="are for the same layer; expected one adapter"):
        read_lora(tmp_path, model)


@pytest.mark.parametrize("begun", ["pissa", "pissa_niter_16", "OLoRA"])
def test_an_adapter_to_a_base_that_was_changed_is_refused(begun, factors, model, tmp_path):
    write_lora({"unet": factors}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"init_lora_weights": begun}))
    with pytest.raises(UsageError, match="init_lora_weights is .*path_initial_model"):
        read_lora(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text('{"init_lora_weights": true, "lora_alpha": 3}')
    assert read_lora(tmp_path, model)["unet"].keys() == factors.keys()


def test_such_an_adapter_is_refused_by_what_diffusers_writes_of_it_too(factors, model, tmp_path):
    tensors = {
        f"{path}.lora_{name}.weight": torch.zeros(factor.shape[::-1])
        for path, (a, b, _) in factors.items()
        for name, factor in (("A", a), ("B", b))
        if ".attn" in path
    }
    for begun in ("gaussian", "pissa"):
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            tmp_path / begun, tensors, unet_lora_adapter_metadata={"init_lora_weights": begun}
        )
    assert len(read_lora(tmp_path / "gaussian", model)["unet"]) == len(tensors) / 2 > 4
    with pytest.raises(UsageError, match="init_lora_weights is 'pissa'.*path_initial_model"):
        read_lora(tmp_path / "pissa", model)


def test_an_alpha_of_a_pattern_is_found_by_the_names_of_transformers_4_too():
    path = "encoder.layers.0.self_attn.q_proj"
    for pattern in (f"text_model.{path}", r"text_model\..*q_proj", "q_proj", path):
        settings = {"lora_alpha": 4, "alpha_pattern": {pattern: 16}}
        assert _scale(settings, "text_encoder", path, 4) == 4.0, pattern
        assert _scale(settings, "text_encoder", path.replace("q_proj", "k_proj"), 4) == 1.0


def test_the_adapter_of_a_projection_is_written_where_diffusers_looks_for_it(sdxl, tmp_path):
    model = StableDiffusion.from_pretrained(sdxl)
    attach_lora(
        model.text_encoder_2, ("text_projection", "q_proj"), rank=2, alpha=2.0, rngs=nnx.Rngs(0)
    )
    written = lora_factors(model.text_encoder_2)
    write_lora({"text_encoder_2": written}, tmp_path / FILE)
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(tmp_path)
    a = pipe.text_encoder_2.text_projection.lora_A["default_0"].weight.detach().numpy()
    np.testing.assert_allclose(a.T, np.asarray(written["text_projection"].a), rtol=1e-6)
    fresh = StableDiffusion.from_pretrained(sdxl)
    assert read_lora(tmp_path, fresh)["text_encoder_2"].keys() == written.keys()


@pytest.mark.parametrize("names", ["today", "older"])
def test_a_unet_s_adapter_of_diffusers_training_scripts_is_read(
    names, factors, sdxl, model, tmp_path
):
    tensors = {}
    for path, (a, b, _) in factors.items():
        if ".attn" in path:
            layer = f"unet.{path}.lora"
            if names == "older":
                layer = layer.replace(".to_", ".processor.to_").replace(".0.lora", ".lora")
                layer = layer.removesuffix(".lora") + "_lora"
            tensors[f"{layer}.down.weight"] = np.ascontiguousarray(np.asarray(a).T)
            tensors[f"{layer}.up.weight"] = np.ascontiguousarray(np.asarray(b).T)
    file = tmp_path / FILE
    save_file(tensors, file)
    found = read_lora(file, model)["unet"]
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    pipe.load_lora_weights(file)  # its own table of the names
    _assert_adds(found, _fused(pipe))
    assert {path.rpartition(".attn")[2] for path in found} >= {"1.to_q", "2.to_out.0"}


def test_a_file_for_another_model_is_refused_by_the_layer_s_name(model, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"lora_unet_nowhere_to_q.lora_down.weight": np.ones((2, 8), np.float32)}, file)
    with pytest.raises(UsageError, match="'nowhere_to_q' of the unet"):
        read_lora(file, model)
    save_file({"unet.conv_in.hada_w1_a": np.ones((2, 8), np.float32)}, file)
    with pytest.raises(UsageError, match="'unet.conv_in.hada_w1_a' belongs to no adapter"):
        read_lora(file, model)
