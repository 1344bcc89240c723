"""A run on a checkpoint and a reward of the hub, whose branches move on."""

import json
import shutil

import pytest
import yaml
from clip_checkpoints import write_clip
from tiny_run import config, lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.components import commit_of, local_directory
from diffusion_grpo.config import load_config
from diffusion_grpo.hub import commits_kept
from diffusion_grpo.model_card import model_card
from diffusion_grpo.run_models import Source, find_model
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.train import train
from diffusion_grpo.weights import weights_file

OLD, NEW = "0" * 39 + "1", "f" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub's cache with two commits of a repository; returns what its branches hold."""
    places = tmp_path / "models--owner--name" / "snapshots"
    write_pipeline(places / OLD, **TWO_LEVELS)
    write_pipeline(places / NEW, prediction_type="v_prediction", **TWO_LEVELS)
    judges = tmp_path / "models--owner--judge" / "snapshots"
    for seed, commit in enumerate((OLD, NEW)):
        (judges / commit).mkdir(parents=True)
        write_clip(judges / commit, seed)
    branches = {None: OLD, "v2": OLD}

    def snapshot_download(name, *, revision, allow_patterns):
        place = {"owner/name": places, "owner/judge": judges}[name]
        return str(place / branches.get(revision, revision))

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


def test_a_run_goes_on_with_the_commit_of_its_reward(hub, tmp_path):
    changed = {"reward__rewards": "clip", "reward__options": "clip.model=owner/judge"}
    changed |= {"model__revision": OLD}
    for name, iterations in (("whole", 2), ("resumed", 1)):
        (tmp_path / name).mkdir()
        settings = config("owner/name", tmp_path / name, **changed, run__iterations=iterations)
        train(settings, quiet=True)
    hub[None] = NEW
    resumed = tmp_path / "resumed/run"
    record = json.loads((resumed / "rewards.json").read_text())
    assert record == {"files": {}, "commits": {"owner/judge": OLD}}
    path = str(resumed / "config.yaml")
    train(load_config(path, ["--run.iterations", "2"]), quiet=True, resume=True)
    assert lasting(resumed) == lasting(tmp_path / "whole/run")
    (tmp_path / "other").mkdir()
    settings = config("owner/name", tmp_path / "other", **changed, run__iterations=2)
    train(settings, quiet=True)  # another run has the branch as it is now
    assert lasting(tmp_path / "other/run")[0] != lasting(resumed)[0]


def test_files_of_a_repository_are_of_one_commit_within_a_context(hub, tmp_path, monkeypatch):
    files = tmp_path / "models--owner--head" / "snapshots"
    asked = []

    def hf_hub_download(name, file, *, revision):
        asked.append(revision)
        return str(files / hub.get(revision, revision) / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with commits_kept({"owner/judge": OLD}) as commits:
        hub[None] = NEW
        assert local_directory("owner/judge", layout="transformers").name == OLD
        assert local_directory("owner/judge@v2", layout="transformers").name == OLD
        hub["v2"] = NEW
        assert local_directory("owner/judge@v2", layout="transformers").name == NEW
        assert weights_file("owner/head/a.pth") == files / NEW / "a.pth"
        hub[None] = OLD
        assert weights_file("owner/head/b.pth") == files / NEW / "b.pth"
        assert weights_file("owner/head@v2/b.pth") == files / NEW / "b.pth"
    assert commits == {"owner/judge": OLD, "owner/head": NEW} and asked == [None, NEW, "v2"]
    assert local_directory("owner/name").name == OLD  # of no context: the branch as it is


def test_a_directory_has_no_commit(hub, tmp_path):
    directory = tmp_path / "models--owner--name" / "snapshots" / OLD
    assert commit_of("owner/name", directory) == OLD
    assert commit_of(directory, directory) is None
    shutil.copytree(directory, tmp_path / "copy")
    assert commit_of("owner/name", tmp_path / "copy") is None
