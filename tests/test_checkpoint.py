"""Checkpoints that are damaged, do not fit, or cannot be written."""

import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.checkpoint import QUALITY, Checkpoints, checksums, template_of
from diffusion_grpo.errors import RunError, UsageError


def tree(step, size=3000):
    values = np.random.default_rng(step).normal(size=size)
    return {
        "leaves": [jnp.asarray(values, jnp.float32), jnp.int32(step), jnp.asarray(values > 0)],
        "half": jnp.asarray(values, jnp.bfloat16),
    }


def filled(directory, steps, **options):
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, tree(step))
    checkpoints.wait()
    return checkpoints


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def assert_is(found, step):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(tree(step)), strict=True):
        assert a.dtype == b.dtype and bool((a == b).all())


def test_the_last_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step, quality in enumerate([0.1, 0.9, None, 0.3, 0.2]):
        checkpoints.save(step, tree(step), quality=quality)
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert again.steps == [1, 3, 4]
    step, found, notes = again.restore(tree(0))
    assert step == 4 and not notes
    assert_is(found, 4)
    again.close()


def test_a_checkpoint_is_read_by_the_shapes_of_its_arrays_alone(tmp_path):
    filled(tmp_path / "checkpoints", [1, 2]).close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    template = template_of(tree(0) | {"half": np.zeros(3000, jnp.bfloat16)})
    on_device = [leaf for leaf in jax.tree.leaves(template) if not isinstance(leaf, np.ndarray)]
    assert len(on_device) == 3
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in on_device)
    for found in (checkpoints.restore(template).tree, checkpoints.read(2, template)):
        assert_is(found, 2)
        assert isinstance(found["half"], np.ndarray)  # the host's stays the host's
        assert all(isinstance(leaf, jax.Array) for leaf in found["leaves"])
    checkpoints.close()


def truncated(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def emptied(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def partly_written(folder):
    for path in sorted(folder.rglob("*"), key=str)[1::2]:
        if path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied, partly_written])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, damage):
    filled(tmp_path / "checkpoints", [3, 5, 8], keep=3).close()
    damage(tmp_path / "checkpoints" / "8")
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    listed = checkpoints.latest == 8  # without its metadata Orbax does not take it for one
    step, found, notes = checkpoints.restore(tree(0))
    assert step == 5
    assert_is(found, 5)
    if listed:
        (note,) = notes
        assert str(tmp_path / "checkpoints" / "8") in note and "going on from 5" in note
        assert (tmp_path / "checkpoints.damaged" / "8").is_dir()
    checkpoints.save(8, tree(8))  # its number is free again
    checkpoints.wait()
    assert checkpoints.restore(tree(0)).step == 8
    checkpoints.close()


@pytest.mark.parametrize("content", [b"", b'{"qual', b"{}", b"[]", b'{"quality": "good"}'])
def test_a_damaged_quality_costs_no_checkpoint(tmp_path, content):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step, quality in ((1, 0.9), (2, 0.1), (3, 0.2)):
        checkpoints.save(step, tree(step), quality=quality)
    checkpoints.close()
    (tmp_path / "checkpoints" / "1" / QUALITY).write_bytes(content)
    with pytest.raises(UsageError, match=r"1/metrics/metrics is damaged.* Delete this file"):
        Checkpoints(tmp_path / "checkpoints", visits=True)
    assert (tmp_path / "checkpoints" / "1" / QUALITY).read_bytes() == content
    again = Checkpoints(tmp_path / "checkpoints")
    step, found, notes = again.restore(tree(0))
    assert step == 3
    assert_is(found, 3)
    (note,) = notes
    assert f"the quality of checkpoint {tmp_path / 'checkpoints' / '1'} was damaged" in note
    again.save(4, tree(4))
    again.close()
    assert again.steps == [3, 4]


def test_where_none_can_be_read_each_is_named(tmp_path, capfd):
    filled(tmp_path / "checkpoints", [1, 2]).close()
    for step in ("1", "2"):
        truncated(tmp_path / "checkpoints" / step)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UsageError, match=r"no checkpoint in .* can be read \(2: .*; 1: .*delete"):
        checkpoints.restore(tree(0))
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err  # of the reads that Orbax forgets


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    filled(tmp_path / "checkpoints", [1]).close()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(UsageError, match="of this run and its model"):
        checkpoints.restore(tree(0, size=3001))
    checkpoints.close()


def test_a_full_disk_is_told_with_the_last_checkpoint(tmp_path):
    checkpoints = filled(tmp_path / "checkpoints", [1])
    large = tree(2, size=300_000)
    checksums(large)  # compiled, and in the cache of programs, before that is refused too
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # the system refuses more
    try:
        with pytest.raises(RunError) as caught:
            checkpoints.save(2, large)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert f"checkpoint {tmp_path / 'checkpoints' / '2'} could not be written" in message
    assert f"the last one is {tmp_path / 'checkpoints' / '1'}" in message
    assert "Make room on the disk" in message
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints")
    assert again.restore(tree(0)).step == 1
    again.close()


def test_checksums_are_sums_of_the_bits():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    expected = int(values.view(np.uint32).astype(np.uint64).sum() % 2**32)
    assert int(checksums([jnp.asarray(values)])[0]) == expected
