"""Reading and writing safetensors one tensor at a time, against the safetensors library."""

import errno
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_grpo.errors import UsageError
from diffusion_grpo.tensor_files import (
    Entry,
    Tensors,
    open_file,
    read_safetensors,
    write_file,
    write_safetensors,
)


def _tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(5, 3)).astype(np.float32),
        "b": rng.normal(size=(7,)).astype(np.float16),
        "c": rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
        "ids": np.arange(6, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.5, np.float32),
        "flag": np.array([True, False, True]),
    }


def _assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and value.shape == second[name].shape
        assert value.tobytes() == second[name].tobytes()


def test_files_of_the_library_are_read(tmp_path):
    save_file(_tensors(), tmp_path / "x.safetensors")
    read = open_file(tmp_path / "x.safetensors")
    _assert_same(_tensors(), dict(read))


def test_the_library_reads_our_files(tmp_path):
    entries = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in _tensors().items()}
    write_file(entries, tmp_path / "x.safetensors")
    _assert_same(_tensors(), load_file(tmp_path / "x.safetensors"))


def test_a_full_disk_is_told_as_such():
    entries = {"a": Entry((9000,), np.dtype(np.float32), lambda: np.zeros(9000, np.float32))}
    with pytest.raises(OSError) as caught:
        write_file(entries, Path("/dev/full"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_our_files_are_those_of_the_library_byte_by_byte(tmp_path):
    floats = {k: v for k, v in _tensors().items() if v.dtype == np.float32}
    save_file(floats, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    entries = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in reversed(floats.items())}
    write_file(entries, tmp_path / "ours.safetensors")
    ours, theirs = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("ours", "theirs"))
    assert ours == theirs


def test_tensors_not_contiguous_are_written_by_their_values(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_file({"x": Entry(value.shape, value.dtype, lambda: value)}, tmp_path / "x.safetensors")
    assert (load_file(tmp_path / "x.safetensors")["x"] == value).all()


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    reads = []

    def entry(name):
        return Entry((2,), np.dtype(np.float32), lambda: reads.append(name) or np.zeros(2, "f4"))

    tensors = Tensors({name: entry(name) for name in "ab"}).cast(np.float16)
    assert list(tensors) == ["a", "b"] and not reads
    assert tensors["b"].dtype == np.float16 and reads == ["b"]


def test_cast_leaves_integers_alone():
    entries = {k: Entry(v.shape, v.dtype, lambda v=v: v) for k, v in _tensors().items()}
    cast = dict(Tensors(entries).cast(ml_dtypes.bfloat16))
    assert {k: v.dtype.name for k, v in cast.items()} == {
        "a.weight": "bfloat16",
        "b": "bfloat16",
        "c": "bfloat16",
        "ids": "int64",
        "empty": "bfloat16",
        "scalar": "bfloat16",
        "flag": "bool",
    }


def test_large_components_are_sharded_as_diffusers_shards_them(tmp_path):
    tensors = {f"layer.{i}": np.full(100, i, np.float32) for i in range(5)}
    files = write_safetensors(tensors, tmp_path, max_shard_bytes=900)  # two of 400 bytes each
    assert [f.name for f in files] == [
        f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["layer.4"] == files[2].name
    _assert_same(tensors, dict(read_safetensors(tmp_path)))


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    tensors = {"a": np.zeros(10, np.float32), "b": np.zeros(1000, np.float32)}
    assert len(write_safetensors(tensors, tmp_path, stem="model", max_shard_bytes=100)) == 2


def test_a_rewritten_component_leaves_no_stale_shards(tmp_path):
    tensors = {f"layer.{i}": np.full(100, i, np.float32) for i in range(5)}
    write_safetensors(tensors, tmp_path, max_shard_bytes=900)
    write_safetensors({"layer": np.zeros(3, np.float32)}, tmp_path)
    assert list(read_safetensors(tmp_path)) == ["layer"]


@pytest.mark.parametrize(
    "index",
    ["diffusion_pytorch_model.fp16.safetensors.index.json",
     "diffusion_pytorch_model.safetensors.index.fp16.json"],
)  # fmt: skip
def test_variants_are_chosen_by_name(tmp_path, index):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    shard = "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"
    save_file({"x": np.zeros(1, np.float16)}, tmp_path / shard)
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
    assert read_safetensors(tmp_path)["x"].dtype == np.float32
    assert read_safetensors(tmp_path, variant="fp16")["x"].dtype == np.float16
    with pytest.raises(UsageError, match="expected diffusion_pytorch_model.bf16.safetensors"):
        read_safetensors(tmp_path, variant="bf16")


def test_only_a_variant_is_there(tmp_path):
    save_file({"x": np.zeros(1, np.float16)}, tmp_path / "model.fp16.safetensors")
    hint = r"holds model.fp16.safetensors.* --variant fp16 \(`train`: --model.variant fp16\)"
    with pytest.raises(UsageError, match=hint):
        read_safetensors(tmp_path)
    assert read_safetensors(tmp_path, variant="fp16")["x"].dtype == np.float16


def test_missing_shard_and_damaged_index_are_named(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(UsageError, match="gone.safetensors is named by model.safetensors.index"):
        read_safetensors(tmp_path)
    index.write_text("[]")
    with pytest.raises(UsageError, match="not an index"):
        read_safetensors(tmp_path)


def test_truncated_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(100, np.float32)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        read_safetensors(tmp_path)
