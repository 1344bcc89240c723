"""A run on a checkpoint of the hub, whose branch moves on."""

import shutil

import pytest
import yaml
from tiny_run import config, lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.components import commit_of
from diffusion_grpo.config import load_config
from diffusion_grpo.model_card import model_card
from diffusion_grpo.run_models import Source, find_model
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.train import train

OLD, NEW = "0" * 39 + "1", "f" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with two commits of a repository; returns what its branches hold."""
    places = tmp_path / "models--owner--name" / "snapshots"
    write_pipeline(places / OLD, **TWO_LEVELS)
    write_pipeline(places / NEW, prediction_type="v_prediction", **TWO_LEVELS)
    branches = {None: OLD, "v2": OLD}

    def snapshot_download(name, *, revision, allow_patterns):
        assert name == "owner/name"
        return str(places / branches.get(revision, revision))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return branches


@pytest.mark.parametrize("revision", [None, pytest.param("v2", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_commit_that_it_began_with(revision, hub, tmp_path):
    for name, iterations in (("whole", 2), ("resumed", 1)):
        folder = tmp_path / name
        folder.mkdir()
        changed = {"model__revision": revision, "run__iterations": iterations}
        train(config("owner/name", folder, **changed), quiet=True)
    hub[revision] = NEW
    resumed = tmp_path / "resumed/run"
    path = resumed / "config.yaml"
    assert yaml.safe_load(path.read_text())["model"]["revision"] == OLD
    train(load_config(str(path), ["--run.iterations", "2"]), quiet=True, resume=True)
    assert lasting(resumed) == lasting(tmp_path / "whole/run")
    assert find_model(f"{resumed}@base") == Source("owner/name", OLD)
    card = model_card(resumed, "lora", SamplingDefaults())
    assert f"from_pretrained('owner/name', revision='{OLD}'" in card


def test_a_directory_has_no_commit(hub, tmp_path):
    directory = tmp_path / "models--owner--name" / "snapshots" / OLD
    assert commit_of("owner/name", directory) == OLD
    assert commit_of(directory, directory) is None
    shutil.copytree(directory, tmp_path / "copy")
    assert commit_of("owner/name", tmp_path / "copy") is None
