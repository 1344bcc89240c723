import dataclasses
import json
import logging
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
from diffusion_grpo.pretrained import (
    StableDiffusion,
    load_clip,
    load_tensors,
    local_directory,
)
from diffusion_grpo.resources import resource_path
from diffusion_grpo.sampling import SamplingDefaults, read_sampling, write_sampling
from diffusion_grpo.shapes import networks
from diffusion_grpo.tensor_files import read_safetensors

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


def test_sampling_defaults_travel_with_a_checkpoint_and_diffusers_does_not_mind(
    directory, tmp_path, caplog
):
    model = StableDiffusion.from_pretrained(directory)
    assert model.sampling is None  # Diffusers wrote none
    own = SamplingDefaults(guidance_scale=1.5, num_steps=7)
    dataclasses.replace(model, sampling=own).save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "diffusion_grpo.json").read_text())
    assert written == {"sampling": {"guidance_scale": 1.5, "num_steps": 7, "clip_skip": 0}}
    again = StableDiffusion.from_pretrained(tmp_path / "ours")
    assert again.sampling == own
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        # without accelerate, Diffusers warns unless it is told so
        StableDiffusionPipeline.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_embedded_checkpoint_says_how_to_sample_it():
    assert read_sampling(resource_path("assets", "shapes-diffusion")) == networks.SAMPLING


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", 'expected {"sampling"'),
        ('{"sampling": {}, "more": 1}', 'expected {"sampling"'),
        ('{"sampling": {"guidance": 1}}', "did you mean 'guidance_scale'"),
        ('{"sampling": {"num_steps": 0}}', "sampling.num_steps is 0; expected 1 or more"),
        ('{"sampling": {"guidance_scale": -1}}', "expected 0 or more"),
    ],
)
def test_damaged_sampling_defaults_are_refused(tmp_path, text, message):
    write_sampling(tmp_path, SamplingDefaults())
    path = tmp_path / "diffusion_grpo.json"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_sampling(tmp_path)
    assert str(path) in str(refused.value) and message in str(refused.value)


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


HUB = """.gitattributes README.md model_index.json diffusion_grpo.json v1-inference.yaml
v1-5-pruned.ckpt v1-5-pruned.safetensors v1-5-pruned-emaonly.safetensors v1-5-pruned-emaonly.ckpt
feature_extractor/preprocessor_config.json safety_checker/config.json
safety_checker/model.safetensors safety_checker/model.fp16.safetensors
safety_checker/pytorch_model.bin scheduler/scheduler_config.json text_encoder/config.json
text_encoder/model.safetensors text_encoder/model.fp16.safetensors text_encoder/pytorch_model.bin
tokenizer/merges.txt tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json
tokenizer/vocab.json unet/config.json unet/diffusion_pytorch_model.bin
unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.fp16.safetensors
unet/diffusion_pytorch_model.non_ema.safetensors vae/config.json
vae/diffusion_pytorch_model.safetensors vae/diffusion_pytorch_model.fp16.safetensors
vae/diffusion_pytorch_model.bin unet/diffusion_pytorch_model-00001-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.json
unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors
unet/diffusion_pytorch_model.safetensors.index.fp16.json""".split()
CLIP = """README.md config.json flax_model.msgpack merges.txt model.safetensors pytorch_model.bin
preprocessor_config.json special_tokens_map.json tf_model.h5 tokenizer.json tokenizer_config.json
vocab.json onnx/model.onnx model.fp16.safetensors""".split()


@pytest.mark.parametrize(
    ("layout", "files", "fetched"),
    [
        (
            "diffusers",
            HUB,
            """model_index.json diffusion_grpo.json scheduler/scheduler_config.json
            text_encoder/config.json text_encoder/model.safetensors tokenizer/merges.txt
            tokenizer/special_tokens_map.json tokenizer/tokenizer_config.json tokenizer/vocab.json
            unet/config.json unet/diffusion_pytorch_model.safetensors
            unet/diffusion_pytorch_model-00001-of-00002.safetensors
            unet/diffusion_pytorch_model.safetensors.index.json vae/config.json
            vae/diffusion_pytorch_model.safetensors""",
        ),
        (
            "transformers",
            CLIP,
            """config.json merges.txt model.safetensors preprocessor_config.json
            special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json""",
        ),
    ],
)
def test_only_what_is_read_is_downloaded(layout, files, fetched, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        (tmp_path / "fetched").write_text(
            " ".join(filter_repo_objects(files, allow_patterns=allow_patterns))
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert local_directory("owner/name", revision="v2", layout=layout) == tmp_path
    assert asked == [("owner/name", "v2")]
    assert set((tmp_path / "fetched").read_text().split()) == set(fetched.split())


def test_a_clip_model_is_downloaded_as_one_model(tmp_path, monkeypatch):
    def snapshot_download(name, *, revision, allow_patterns):
        assert "model.safetensors" in allow_patterns
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UsageError, match="owner/name.*no network"):
        load_clip("owner/name")


def test_unknown_hub_id_offline_says_what_to_do():
    with pytest.raises(UsageError, match="nobody/nothing.*HF_HUB_OFFLINE.*give the directory"):
        StableDiffusion.from_pretrained("nobody/nothing")
