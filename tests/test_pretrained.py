import dataclasses
import json
import logging
import re
import shutil
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch_checkpoints import write_family, write_pipeline
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.pretrained import (
    StableDiffusion,
    load_clip,
    load_tensors,
    local_directory,
    module_tensors,
)
from diffusion_grpo.resources import resource_path
from diffusion_grpo.sampling import SamplingDefaults, read_sampling, write_sampling
from diffusion_grpo.shapes import networks
from diffusion_grpo.shapes.tokenizer import write_tokenizer
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


TEXTS = [
    "",
    "a red circle above two blue squares",
    "It's 12 dogs\n\t and  they don't!! wow !",
    "Ünïcödé: cafe\u0301, straße, 猫, ½, Привет 🐱🚀",
    "<|startoftext|>a cat<|endoftext|>",
    "yellow triangles, left of a very large purple blancmange; " * 20,
]
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def _slow_ids(folder, text, length=None):
    """Ids by the files of Transformers 4 alone, as OpenAI's CLIP finds them: merge by merge."""
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    merges = (folder / "merges.txt").read_text("utf-8").rstrip("\n").split("\n")[1:]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(merges)}
    special = json.loads((folder / "special_tokens_map.json").read_text("utf-8"))
    symbols = bytes_to_unicode()
    ids = []
    for part in re.split("(" + "|".join(map(re.escape, set(special.values()))) + ")", text):
        if part in special.values():
            ids.append(vocabulary[part])
            continue
        for word in regex.findall(CLIP_WORDS, unicodedata.normalize("NFC", part).lower()):
            pieces = [symbols[byte] for byte in word.encode()]
            pieces[-1] += "</w>"
            while pairs := {p for p in zip(pieces, pieces[1:], strict=False) if p in ranks}:
                first = min(pairs, key=ranks.__getitem__)
                i = 0
                while i < len(pieces) - 1:
                    if (pieces[i], pieces[i + 1]) == first:
                        pieces[i : i + 2] = ["".join(first)]
                    i += 1
            ids += [vocabulary[piece] for piece in pieces]
    begin, end, pad = (vocabulary[special[f"{name}_token"]] for name in ("bos", "eos", "pad"))
    if length is None:
        return [begin, *ids, end]
    ids = [begin, *ids[: length - 2], end]
    return ids + [pad] * (length - len(ids))


def _assert_exported_tokenizer(folder, source):
    """What was written gives the source's ids, in Transformers 5 and by the files of 4."""
    original, again = map(CLIPTokenizer.from_pretrained, (source, folder))
    length = original.model_max_length
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == length
    for text in TEXTS:
        for options, slow in (
            ({}, _slow_ids(folder, text)),
            (
                {"padding": "max_length", "truncation": True, "max_length": length},
                _slow_ids(folder, text, length),
            ),
        ):
            expected = original(text, **options)["input_ids"]
            assert slow == again(text, **options)["input_ids"] == expected, text


def _published_tokenizers(pipeline):
    """Give the tokenizers the files that published checkpoints have, of Transformers 4."""
    for part, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        settings = json.loads((pipeline / part / "tokenizer_config.json").read_text())
        shutil.rmtree(pipeline / part)
        write_tokenizer(pipeline / part, settings["model_max_length"])
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            fields = json.loads((pipeline / part / name).read_text())
            (pipeline / part / name).write_text(json.dumps(fields | {"pad_token": pad}))
    return pipeline


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json and merges.txt"])
def test_tokenizers_written_by_us_have_the_files_of_transformers_4_too(files, tmp_path):
    source, ours = write_family(tmp_path / "sdxl", "sdxl"), tmp_path / "ours"
    if files != "tokenizer.json":
        _published_tokenizers(source)
    StableDiffusion.from_pretrained(source).save_pretrained(ours)
    for part in ("tokenizer", "tokenizer_2"):
        _assert_exported_tokenizer(ours / part, source / part)
        for name in ("vocab.json", "merges.txt"):
            assert (source / part / name).exists() == (files != "tokenizer.json")
            if files != "tokenizer.json":
                assert (ours / part / name).read_bytes() == (source / part / name).read_bytes()


def test_the_embedded_checkpoint_s_tokenizer_is_written_with_the_files_of_transformers_4(tmp_path):
    source = resource_path("assets", "shapes-diffusion")
    StableDiffusion.from_pretrained(source).save_pretrained(tmp_path)
    _assert_exported_tokenizer(tmp_path / "tokenizer", source / "tokenizer")


def test_a_special_token_that_was_changed_is_written(directory, tmp_path):
    write_tokenizer(directory / "tokenizer")
    model = StableDiffusion.from_pretrained(directory)
    model.tokenizer.pad_token = "!"
    model.save_pretrained(tmp_path / "ours")
    again = StableDiffusion.from_pretrained(tmp_path / "ours")
    assert again.tokenizer.pad_token == "!"


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
        ('{"sampling": {"height": -8}}', "sampling.height is -8; expected a positive number"),
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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"unet": {"in_channels": 9}}, "in_channels is 9, its out_channels 4 .*for inpainting"),
        ({"unet": {"in_channels": 8}}, "in_channels is 8, its out_channels 4 .*text-to-image"),
        ({"unet": {"out_channels": 8}}, "in_channels is 4, its out_channels 8 "),
        ({"vae": {"latent_channels": 16}}, "VAE's latent_channels 16; expected the same number"),
        ({"vae": {"in_channels": 6, "out_channels": 6}}, "out_channels 6; expected 3 and 3"),
        ({"unet": {"num_class_embeds": 10}}, "has class_embed_type or num_class_embeds"),
        ({"unet": {"dual_cross_attention": True}}, "has dual_cross_attention.*text-to-image"),
        ({"text_encoder": {"use_attention_mask": True}}, "has use_attention_mask.*expected false"),
    ],
)
def test_networks_that_cannot_be_used_are_refused_before_weights_are_read(
    changed, message, directory
):
    for part, fields in changed.items():
        path = directory / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    for weights in directory.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UsageError, match=message):
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
            "configs",
            HUB,
            """model_index.json scheduler/scheduler_config.json text_encoder/config.json
            unet/config.json vae/config.json""",
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


def test_a_single_model_is_asked_for_at_the_revision_in_its_name(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for name in ("owner/name@v2", "owner/name@0123abc", "owner/name"):
        local_directory(name, layout="transformers")
        local_directory(name, layout="processor")
    pairs = [("owner/name", "v2"), ("owner/name", "0123abc"), ("owner/name", None)]
    assert asked == [pair for pair in pairs for _ in range(2)]
    asked.clear()
    local_directory("owner/name@v2", revision="v3", layout="transformers")
    local_directory("owner/name@v2")  # a pipeline's revision is an option of its own
    local_directory("owner/name@", layout="transformers")
    assert asked == [("owner/name@v2", "v3"), ("owner/name@v2", None), ("owner/name@", None)]


def hub_stub(files, folder, monkeypatch):
    """Have a hub repository's files appear in a folder as they are asked for; returns who asked."""
    from huggingface_hub.utils import filter_repo_objects

    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append(revision)
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).touch()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize(
    ("variant", "weights", "revisions"),
    [
        (
            "fp16",
            """unet/diffusion_pytorch_model.fp16 vae/diffusion_pytorch_model.fp16
            text_encoder/model.fp16""",
            ["v2"],
        ),
        (
            "non_ema",
            """unet/diffusion_pytorch_model.non_ema vae/diffusion_pytorch_model
            text_encoder/model""",
            ["v2", "c0ffee"],
        ),
    ],
)
def test_a_component_is_downloaded_plain_where_it_lacks_the_variant(
    variant, weights, revisions, tmp_path, monkeypatch
):
    folder = tmp_path / "c0ffee"
    asked = hub_stub([name for name in HUB if "-of-" not in name], folder, monkeypatch)
    assert local_directory("owner/name", revision="v2", variant=variant) == folder
    assert asked == revisions
    found = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert found == {f"{name}.safetensors" for name in weights.split()}


def test_a_variant_that_no_component_has_is_refused(directory, tmp_path, monkeypatch):
    hub_stub(HUB, tmp_path / "c0ffee", monkeypatch)
    with pytest.raises(UsageError, match="'bf16', but no component of the checkpoint 'owner/name'"):
        local_directory("owner/name", variant="bf16")
    weights = directory / UNET
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UsageError, match=r"no component of .*copy' has .*expected fp16, or leave"):
        StableDiffusion.from_pretrained(directory, variant="bf16")


def test_a_variant_of_the_unet_alone_is_read_as_diffusers_reads_it(directory):
    changed = {name: 2 * tensor for name, tensor in load_file(directory / UNET).items()}
    save_file(
        changed,
        directory / "unet/diffusion_pytorch_model.non_ema.safetensors",
        metadata={"format": "pt"},
    )
    pipe = StableDiffusionPipeline.from_pretrained(directory, variant="non_ema")
    with pytest.warns(UserWarning, match="variant 'non_ema' for vae, text_encoder, read without"):
        model = StableDiffusion.from_pretrained(directory, variant="non_ema")
    for name, part in (("unet", model.unet), ("vae", model.vae)):
        expected = getattr(pipe, name).state_dict()
        for key, tensor in module_tensors(part).items():
            np.testing.assert_array_equal(tensor, expected[key].numpy())
    assert (module_tensors(model.unet)[TENSOR] == changed[TENSOR]).all()


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
