import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch_checkpoints import write_pipeline

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.pretrained import StableDiffusion, load_tensors, read_safetensors

UNET = "unet/diffusion_pytorch_model.safetensors"
TENSOR = "down_blocks.0.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("checkpoint") / "pipeline")


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def _outputs(pipe):
    ids = pipe.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0]
        noise = pipe.unet(torch.ones(1, 4, 8, 8), 5, states).sample
        return pipe.vae.decode(noise).sample.permute(0, 2, 3, 1).numpy()


def test_pipeline_written_by_diffusers_gives_the_same_outputs(directory):
    expected = _outputs(StableDiffusionPipeline.from_pretrained(directory))
    model = StableDiffusion.from_pretrained(directory)
    ids = model.tokenizer(["a red circle"], padding="max_length")["input_ids"]
    states = model.text_encoder(jnp.asarray(ids, jnp.int32)).last_hidden_state
    noise = model.unet(jnp.ones((1, 8, 8, 4)), jnp.array([5]), states)
    assert (
        np.abs(np.asarray(model.vae.decode(noise)) - expected).max()
        <= 1e-4 * np.abs(expected).max()
    )


def test_pipeline_written_by_us_loads_in_diffusers_unchanged(directory, tmp_path):
    expected = _outputs(StableDiffusionPipeline.from_pretrained(directory))
    StableDiffusion.from_pretrained(directory).save_pretrained(tmp_path / "ours")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert (_outputs(pipe) == expected).all()
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_every_tensor_survives_the_round_trip_bit_by_bit(directory, tmp_path):
    StableDiffusion.from_pretrained(directory).save_pretrained(tmp_path / "ours")
    for name in (UNET, "vae/diffusion_pytorch_model.safetensors"):
        first, second = load_file(directory / name), load_file(tmp_path / "ours" / name)
        assert first.keys() == second.keys()
        assert all(
            (first[k] == second[k]).all() and first[k].dtype == second[k].dtype for k in first
        )


def test_old_attention_and_text_encoder_names_are_read(directory):
    path = directory / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for today, then in old.items():
            name = name.replace(f".{today}.", f".{then}.")
        tensors[name] = tensor
    assert any(".proj_attn." in name for name in tensors)
    config = VAEConfig.from_dict(json.loads((directory / "vae/config.json").read_text()))
    renamed = load_tensors(AutoencoderKL, config, tensors, source="renamed")
    plain = load_tensors(AutoencoderKL, config, load_file(path), source="plain")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (renamed, plain)), strict=True):
        assert (a == b).all()


def test_parameters_are_held_in_the_dtypes_asked_for(directory):
    model = StableDiffusion.from_pretrained(
        directory, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, unet_param_dtype=jnp.float32
    )
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model.unet))} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model.vae))} == {jnp.dtype("bfloat16")}


def test_sharded_weights_are_read(directory):
    path = directory / UNET
    tensors = load_file(path)
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, path.parent / file)
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    path.unlink()
    (path.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert read_safetensors(path.parent).keys() == tensors.keys()


def _edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_missing_tensor_is_named(directory):
    _edit(directory / UNET, lambda tensors: tensors.pop(TENSOR))
    with pytest.raises(UsageError, match=f"missing tensor '{TENSOR}'"):
        StableDiffusion.from_pretrained(directory)


def test_left_over_tensor_is_named(directory):
    _edit(directory / UNET, lambda tensors: tensors.update(extra_weight=np.zeros(3, np.float32)))
    with pytest.raises(UsageError, match="unexpected tensor 'extra_weight'"):
        StableDiffusion.from_pretrained(directory)


def test_misshapen_tensor_is_named_with_both_shapes(directory):
    _edit(
        directory / UNET,
        lambda tensors: tensors.update({TENSOR: np.zeros((16, 16, 1, 1), np.float32)}),
    )
    with pytest.raises(UsageError, match=r"conv1.weight.*\(16, 16, 1, 1\).*\(16, 16, 3, 3\)"):
        StableDiffusion.from_pretrained(directory)


def test_pickled_weights_are_refused(directory):
    (directory / UNET).rename(directory / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UsageError, match=r"diffusion_pytorch_model.bin.*never loaded"):
        StableDiffusion.from_pretrained(directory)


def test_damaged_weights_are_refused(directory):
    (directory / UNET).write_bytes(b"\x00" * 100)
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        StableDiffusion.from_pretrained(directory)


def test_directory_without_model_index_is_refused(directory):
    (directory / "model_index.json").unlink()
    with pytest.raises(UsageError, match="no model_index.json"):
        StableDiffusion.from_pretrained(directory)


def test_missing_component_is_named(directory):
    shutil.rmtree(directory / "vae")
    with pytest.raises(UsageError, match="no vae/"):
        StableDiffusion.from_pretrained(directory)


def test_other_pipelines_are_refused_by_name(directory):
    index = json.loads((directory / "model_index.json").read_text())
    index["unet"] = ["diffusers", "SD3Transformer2DModel"]
    (directory / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="SD3Transformer2DModel, which is not supported"):
        StableDiffusion.from_pretrained(directory)


def test_unknown_hub_id_offline_says_what_to_do():
    with pytest.raises(UsageError, match="nobody/nothing.*give the directory"):
        StableDiffusion.from_pretrained("nobody/nothing")
