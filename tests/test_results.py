"""What a run leaves behind for people to read."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion_grpo.config import Config, EvalConfig, PromptsConfig
from diffusion_grpo.evaluate import Evaluation, describe_list
from diffusion_grpo.grids import before_after_grid
from diffusion_grpo.results import describe, group_metrics, save_results, update_metrics


def evaluation(shift=0.0, names=("clip",), trained_on=1):
    """14 images, of which the first 12 score `shift` and the others 7 more: the mean is 1 more."""
    images = np.full((14, 8, 8, 3), 100, np.uint8)
    score = np.array([0] * 12 + [7] * 2, np.float32) + np.float32(shift)
    scores = {name: score * (place + 1) for place, name in enumerate(names)}
    prompts = [f"number {place}" for place in range(14)]
    return Evaluation(images, prompts, scores, score, trained_on)


@pytest.fixture
def saved(tmp_path):
    def save(before, after):
        (tmp_path / "samples").mkdir()
        save_results(Config(eval=EvalConfig(images_per_prompt=1)), tmp_path, before, after)
        return tmp_path

    return save


def test_errors_are_of_prompts_and_that_of_the_difference_is_of_pairs(tmp_path):
    (tmp_path / "samples").mkdir()
    scores = np.array([[1, 2, 4, 9], [2, 4, 5, 12]], np.float32)  # 2 prompts of 2 images each
    images = np.full((4, 8, 8, 3), 100, np.uint8)
    before, after = (
        Evaluation(images, ["a", "a", "b", "b"], {"clip": s}, s, images_per_prompt=2)
        for s in scores
    )
    save_results(Config(eval=EvalConfig(images_per_prompt=2)), tmp_path, before, after)
    found = json.loads((tmp_path / "evaluation.json").read_text())["rewards"]["clip"]
    means = scores.reshape(2, 2, 2).mean(axis=2)  # of each prompt
    for name, values in zip(("before", "after"), means, strict=True):
        assert found[name] == pytest.approx(values.mean())
        assert found[f"{name}_standard_error"] == pytest.approx(values.std(ddof=1) / np.sqrt(2))
    pairs = means[1] - means[0]
    assert found["difference"] == pytest.approx(pairs.mean())
    assert found["difference_standard_error"] == pytest.approx(pairs.std(ddof=1) / np.sqrt(2))
    assert pairs.std() < 0.2 * means.std(axis=1).min()  # unpaired it would be another number


def test_a_single_prompt_has_no_standard_error(saved):
    images = np.full((2, 8, 8, 3), 100, np.uint8)
    score = np.array([1, 2], np.float32)
    one = Evaluation(images, ["a", "a"], {"clip": score}, score, images_per_prompt=2)
    text = (saved(one, one) / "evaluation.json").read_text()
    assert "NaN" not in text
    found = json.loads(text)["rewards"]["clip"]
    assert [found[f"{name}_standard_error"] for name in ("before", "difference")] == [None, None]
    assert describe(one, "before") == "evaluation, before: clip 1.5000"


def test_an_evaluation_says_which_list_it_is_on():
    assert describe_list(PromptsConfig("a.txt", "b.txt"), 3) == (
        "3 images of the held-out prompts 'b.txt'"
    )
    assert describe_list(PromptsConfig("a.txt", None), 3) == (
        "3 images of the training prompts 'a.txt'"
    )


def test_the_heading_of_the_pairs_has_the_means_of_all_images_not_of_those_shown(saved):
    before, after = evaluation(), evaluation(2.0)
    expected = before_after_grid(
        before.images[:12],
        after.images[:12],
        before.prompts[:12],
        scores_before=np.zeros(12),
        scores_after=np.full(12, 2.0),
        title="mean score of 14 images, 12 of them shown: before 1.000, after 3.000",
    )
    drawn = Image.open(saved(before, after) / "samples" / "before_after.png")
    assert (np.asarray(drawn) == np.asarray(expected)).all()


@pytest.mark.parametrize(
    ("names", "trained_on", "reported"),
    [
        (("clip",), 1, ["clip"]),
        (("clip", "gold"), 1, ["clip", "gold"]),
        (("clip", "other"), 2, ["total", "clip", "other"]),
    ],
)
def test_the_total_is_told_only_where_it_sums_several_rewards(saved, names, trained_on, reported):
    before, after = (evaluation(shift, names, trained_on) for shift in (0.0, 2.0))
    rewards = json.loads((saved(before, after) / "evaluation.json").read_text())["rewards"]
    assert list(rewards) == reported
    assert [rewards[name]["difference"] for name in names] == [2.0, 4.0][: len(names)]
    assert rewards[reported[0]]["before"] == 1.0
    assert ("total" in describe(before, "before")) == ("total" in reported)
    assert "clip 1.0000" in describe(before, "before")


def test_a_group_teaches_nothing_where_all_its_advantages_are_zero():
    total = np.array([1.0, 3.0, 5.0, 5.0, 9.0, 9.0], np.float32)
    advantages = np.array([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    kept = np.array([True] * 4 + [False] * 2)
    found = group_metrics(total, advantages, kept, 2)
    assert found == {"reward/group_std": 0.5, "advantage/zero_groups": 0.5}


def test_an_iteration_s_metrics_are_means_over_the_updates_that_have_them():
    first = {"ratio/min": 1.0, "ratio/max": 1.0, "skipped": 1, "loss": 1.0}
    second = {"ratio/min": 0.5, "ratio/max": 3.0, "skipped": 1, "loss": 2.0, "clip_fraction": 0.9}
    assert update_metrics([first, second]) == {
        "ratio/min": 0.5,
        "ratio/max": 3.0,
        "skipped": 2,
        "loss": 1.5,
        "clip_fraction": 0.9,
    }
