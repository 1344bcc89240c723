"""The script of the ablations: its variants are runs, and its table is that of their files."""

import json
from pathlib import Path

import pytest
from scripts import load_script

from diffusion_grpo.config import PRESETS, load_config

ablations = load_script("ablations")


@pytest.mark.parametrize("variant", ablations.VARIANTS)
def test_a_variant_is_a_run_that_differs_from_its_preset(variant):
    preset = ablations.preset_of(variant)
    config = load_config(preset, ablations.flags_of(variant))
    assert (config == PRESETS[preset]) == (variant == preset)
    assert config.rollout.num_images == PRESETS["demo"].rollout.num_images


def test_runs_have_directories_of_their_own():
    places = {ablations.directory_of(Path("a"), v, s) for v in ablations.VARIANTS for s in (0, 1)}
    assert len(places) == 2 * len(ablations.VARIANTS)
    assert ablations.directory_of(Path("a"), "no window, K = T/2", 1) == Path("a/no-window-k-t-2-1")


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
        ablations.add_to_record(
            file, ["--eval.every", "5"], variant, seed, found | {"minutes": seed}
        )
    runs = ablations.of_seeds(ablations.load_record(file, ["--eval.every", "5"]))
    assert list(runs) == ["demo", "nft"] and [r["minutes"] for r in runs["nft"]] == [2, 10]
    assert "| nft | 2 | 40.0" in file.with_suffix(".md").read_text()
    with pytest.raises(SystemExit, match="expected the same"):
        ablations.load_record(file, [])
