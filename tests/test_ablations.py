"""The script of the ablations: its variants are runs, and its table is that of their files."""

import json
import re
from pathlib import Path

import pytest
from scripts import load_script

from diffusion_grpo.config import PRESETS, load_config

ablations = load_script("ablations")
FEW = ["--eval.every", "5"]


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_a_variant_is_a_run_that_differs_from_its_preset(variant):
    preset = ablations.preset_of(variant)
    config = load_config(preset, ablations.flags_of(variant))
    assert (config == PRESETS[preset]) == (variant == preset)
    assert config.rollout.num_images == PRESETS["demo"].rollout.num_images


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_a_variant_s_own_flags_count_beside_those_of_all(variant):
    arguments = ablations.train_arguments(variant, 3, ablations.FLAGS)
    config = load_config(arguments[0], arguments[1:])
    own = load_config(arguments[0], ablations.flags_of(variant))
    told = re.search(r"(\d+) iterations", variant)
    assert config.run.iterations == (int(told[1]) if told else 100)
    assert (config.run.seed, config.eval.every) == (3, 50)
    assert (config.grpo, config.optim, config.rollout) == (own.grpo, own.optim, own.rollout)


def test_runs_have_directories_of_their_own():
    def place(variant, seed, extra=(), base="abc"):
        return ablations.directory_of(Path("a"), variant, seed, extra, base)

    places = {place(variant, seed) for variant in ablations.VARIANTS for seed in (0, 1)}
    assert len(places) == 2 * len(ablations.VARIANTS)
    assert place("no window, K = T/2", 1).name.startswith("no-window-k-t-2-1-")
    assert place("demo", 0) == place("demo", 0)
    # Other flags for all, or other models to start from, make another run.
    assert len({place("demo", 0), place("demo", 0, FEW), place("demo", 0, base="abd")}) == 3


def test_the_embedded_models_are_told_by_their_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "resource_path", lambda kind: tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"1")
    first = ablations.embedded_models()
    (tmp_path / "model" / "README.md").write_text("a card")
    assert ablations.embedded_models() == first
    (tmp_path / "model" / "a.safetensors").write_bytes(b"2")
    assert ablations.embedded_models() != first


def test_the_table_has_means_and_ranges_of_the_seeds(tmp_path):
    for seed, after in enumerate((0.6, 0.7)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rewards = {
            "clip": {"before": 0.5, "after": 0.61},
            "shapes": {"before": 0.48, "after": after},
        }
        (folder / "evaluation.json").write_text(json.dumps({"rewards": rewards}))
        rows = [
            {"iteration": 0, "time/iteration": 30.0},
            {
                "iteration": 1,
                "time/iteration": 90.0,
                "eval/reward/mean": 0.6,
                "eval/reward/shapes/mean": 0.5,
            },
            {"iteration": 2, "time/iteration": 30.0},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [ablations.read_run(tmp_path / str(seed)) for seed in (0, 1)]
    assert runs[0]["curve"] == [
        {"iteration": 2, "minutes": 1.0, "shapes": 0.5}
    ]  # the median is 30 s
    table = ablations.to_table({"demo": runs, "nft": runs[:1]})
    assert "| demo | 2 | 48.0 (48.0 to 48.0) | 65.0 (60.0 to 70.0) | 0.6100 (" in table
    assert "| nft | 1 | 48.0 | 60.0 | 0.6100 | 1.5 |" in table


def test_curves_begin_before_the_first_iteration_and_end_after_the_last():
    def run(seed):
        gold, reward = {"before": 0.4, "after": 0.6 + seed}, {"before": 0.5, "after": 0.7}
        row = {"iteration": 5, "minutes": 1.0 + seed, "shapes_exact": 0.5, "shapes": 0.6 - seed}
        rewards = {"shapes": reward, "shapes_exact": gold}
        return {"rewards": rewards, "minutes": 2.0 + seed, "curve": [row]}

    found = [run(0.0), run(0.1)]
    assert ablations.curve_of(found, ablations.gold_of) == [
        (0.0, [0.4, 0.4]),
        (1.05, [0.5, 0.5]),
        (2.05, [0.6, 0.7]),
    ]
    assert ablations.curve_of(found, ablations.trained_of)[1] == (1.05, [0.6, 0.5])
    assert ablations.trained_of({"shapes": 0.6, "clip": 0.3}) == 0.3


def test_a_record_grows_and_is_of_one_kind_of_run(tmp_path):
    file = tmp_path / "record.json"
    before = {"shapes": {"before": 0.4, "after": 0.5}}
    found = {"rewards": before, "minutes": 3.0, "curve": [{"minutes": 1.0, "shapes": 0.45}]}
    for variant, seed in (("nft", 10), ("nft", 2), ("demo", 0)):
        ablations.add_to_record(file, FEW, "abc", variant, seed, found | {"minutes": seed})
    runs = ablations.of_seeds(ablations.load_record(file, FEW))
    assert list(runs) == ["demo", "nft"] and [r["minutes"] for r in runs["nft"]] == [2, 10]
    assert "| nft | 2 | 40.0" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="expected the same"):
        ablations.load_record(file, [])
    with pytest.raises(SystemExit, match="embedded models abc, and those here are abd"):
        ablations.add_to_record(file, FEW, "abd", "demo", 1, found)
