import dataclasses
import io
import json
import time

import numpy as np
import pytest
from PIL import Image
from recorded_run import record_run
from scipy.stats import binomtest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_grpo.config import Config, EvalConfig, PromptsConfig, RunConfig, load_config
from diffusion_grpo.errors import Preempted, RunError, UsageError
from diffusion_grpo.evaluate import Evaluation
from diffusion_grpo.evaluation_summary import summarize, to_markdown
from diffusion_grpo.recorder import Recorder, early_stop_reason
from diffusion_grpo.trackers import TensorBoard, check_trackers, make_trackers


def evaluation(clip, gold=None, each=1, tasks=None, lower=()):
    clip = np.asarray(clip, np.float32)
    scores = {"clip": clip} | ({} if gold is None else {"shapes": np.asarray(gold, np.float32)})
    images = np.random.default_rng(0).integers(0, 256, (len(clip), 16, 16, 3), dtype=np.uint8)
    prompts = [f"prompt {i // each}" for i in range(len(clip))]
    return Evaluation(
        images, prompts, scores, clip, images_per_prompt=each, tasks=tasks, lower=lower
    )


@pytest.mark.parametrize(
    ("history", "patience", "stops"),
    [
        # gold falls twice while the reward rises
        ([(0, 1.0, 0.5), (10, 1.2, 0.6), (20, 1.3, 0.5), (30, 1.4, 0.4)], 2, True),
        ([(0, 1.0, 0.5), (10, 1.2, 0.6), (20, 1.3, 0.5), (30, 1.4, 0.4)], 3, False),
        # gold rose in between, and stayed below its best
        ([(0, 1.0, 0.5), (10, 1.2, 0.6), (20, 1.3, 0.3), (30, 1.4, 0.4)], 2, True),
        # gold came back above its best in between
        ([(0, 1.0, 0.5), (10, 1.2, 0.4), (20, 1.3, 0.6), (30, 1.4, 0.5)], 2, False),
        # the reward fell too: nothing is hacked
        ([(0, 1.0, 0.5), (10, 1.2, 0.6), (20, 1.1, 0.5), (30, 1.1, 0.4)], 2, False),
        ([(0, 1.0, 0.5), (10, 1.2, 0.4), (20, 1.3, 0.3)], 0, False),
    ],
)
def test_a_run_stops_when_gold_falls_while_the_reward_rises(history, patience, stops):
    reason = early_stop_reason(history, patience)
    assert (reason is not None) == stops
    if stops:
        assert "0.6 after 10 iterations (now 0.4)" in reason and "1.2 to 1.4" in reason


def config(tmp_path, **fields):
    options = EvalConfig(every=2, **fields)
    return Config(eval=options, run=RunConfig(output=str(tmp_path), report=False))


def test_best_model_is_that_of_the_gold_reward_and_the_reason_to_stop_is_kept(tmp_path):
    settings = config(tmp_path, gold=("shapes",), patience=1)
    with Recorder(settings, tmp_path, gold={"shapes": 1.0}) as recorder:
        recorder.evaluation(0, evaluation([0.1, 0.2], [0.5, 0.5]))
        assert recorder.stop_reason() is None
        recorder.evaluation(2, evaluation([0.2, 0.3], [0.6, 0.6]))
        assert recorder.is_best(2) and recorder.stop_reason() is None
        (tmp_path / "best").mkdir()
        recorder.evaluation(4, evaluation([0.4, 0.5], [0.1, 0.2]))
        assert not recorder.is_best(4)
        reason = recorder.stop_reason()
        assert "gold reward was below its best, 0.6 after 2 iterations" in reason
        assert json.loads((tmp_path / "early_stop.json").read_text())["reason"] == reason
        assert "after 2 iterations: best/" in recorder.settle_best(4)
        assert (tmp_path / "best").is_dir()
    # resumed: what came after is gone
    with Recorder(settings, tmp_path, start=2, gold={"shapes": 1.0}) as recorder:
        assert not (tmp_path / "early_stop.json").exists()
        recorder.evaluation(0, evaluation([0.1, 0.2], [0.5, 0.5]))
        recorder.evaluation(4, evaluation([0.4, 0.5], [0.9, 0.9]))
        assert recorder.is_best(4) and "final/" in recorder.settle_best(4)
        assert not (tmp_path / "best").exists()
        iterations = [entry.iteration for entry in recorder.gallery.entries("evaluation")]
        assert iterations == [0, 2, 4]


def test_the_best_mean_is_said_to_be_over_the_prompts_that_were_drawn(tmp_path):
    for heldout, said in (
        ("list.txt", "held-out mean 0.2"),
        (None, "mean over the training prompts"),
    ):
        settings = dataclasses.replace(config(tmp_path), prompts=PromptsConfig("a.txt", heldout))
        with Recorder(settings, tmp_path / str(heldout)) as recorder:
            recorder.evaluation(0, evaluation([0.1, 0.3]))
            assert f"best {said}" in recorder.settle_best(0)


def test_an_evaluation_that_was_not_finished_is_forgotten(tmp_path):
    with Recorder(config(tmp_path), tmp_path) as recorder:
        for done, value in ((0, 0.1), (2, 0.5), (4, 0.9)):
            recorder.evaluation(done, evaluation([value, value]))
        (tmp_path / "best").mkdir()
        assert "after 4 iterations: final/" in recorder.settle_best(4)
    with Recorder(config(tmp_path), tmp_path, start=4, evaluated=False) as recorder:
        iterations = [entry.iteration for entry in recorder.gallery.entries("evaluation")]
        assert iterations == [0, 2]
        recorder.evaluation(6, evaluation([0.2, 0.2]))
        said = recorder.settle_best(6)
        assert "after 2 iterations: not kept (the run ended with a better one, and was" in said
    with Recorder(config(tmp_path), tmp_path, start=0, evaluated=False) as recorder:
        assert [e.iteration for e in recorder.gallery.entries("evaluation")] == [0]


def test_a_report_that_cannot_be_written_does_not_hide_what_ended_the_run(tmp_path):
    # No run is there, so that there can be no report.
    settings = Config(run=RunConfig(output=str(tmp_path), report=True))
    with pytest.raises(KeyboardInterrupt), Recorder(settings, tmp_path):
        raise KeyboardInterrupt("stopped")
    with pytest.raises(RunError), Recorder(settings, tmp_path):
        pass


@pytest.mark.parametrize(("error", "written"), [(Preempted, False), (KeyboardInterrupt, True)])
def test_a_run_that_is_preempted_spends_no_time_on_its_report(error, written, tmp_path):
    directory = record_run(tmp_path / "run", iterations=1, heldout=4)
    with pytest.raises(error), Recorder(load_config(str(directory / "config.yaml")), directory):
        raise error("stopped")
    assert (directory / "report.html").is_file() == written


def test_the_best_model_is_that_of_the_weighted_gold_rewards(tmp_path):
    golds = {"shapes": -3.0, "clip": 1.0}  # of the first, less is better
    with Recorder(config(tmp_path, keep_best=False), tmp_path, gold=golds) as recorder:
        recorder.evaluation(0, evaluation([0.2, 0.2], [0.5, 0.5]))
        recorder.evaluation(2, evaluation([0.1, 0.1], [0.4, 0.4]))
        assert recorder.quality(2) == pytest.approx((-3 * 0.4 + 0.1) / 4)
        assert recorder.is_best(2)
        recorder.evaluation(4, evaluation([0.3, 0.3], [0.5, 0.5]))
        assert not recorder.is_best(4)
        # it was not kept, so that nothing may be taken for it
        assert "after 2 iterations: not kept" in recorder.settle_best(4)
    found = json.loads((tmp_path / "best.json").read_text())
    assert found["model"] == "not kept (eval.keep_best is False)" and found["iterations"] == 2


def test_trackers_have_the_evaluations_before_and_after(tmp_path):
    with Recorder(config(tmp_path), tmp_path) as recorder:
        recorder.evaluation(0, evaluation([0.1, 0.3]))
        recorder.evaluation(4, evaluation([0.5, 0.7]), last=True)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(e.step, round(e.value, 4)) for e in read.Scalars("eval/reward/mean")]
    assert found == [(0, 0.2), (4, 0.6)]


def test_errors_are_over_prompts(tmp_path):
    one = evaluation([0.1, 0.5, 0.3, 0.9], each=1)
    repeated = evaluation(np.repeat([0.1, 0.5, 0.3, 0.9], 5), each=5)
    want = np.std([0.1, 0.5, 0.3, 0.9], ddof=1) / 2
    for found in (one, repeated):
        assert found.error(found.total) == pytest.approx(want)
        assert found.metrics()["reward/standard_error"] == pytest.approx(want)


def test_summary_compares_the_same_prompts_and_seeds(tmp_path):
    base = evaluation([1.0, 2.0, 3.0, 4.0], each=2, tasks=["a", "a", "b", "b"])
    tuned = evaluation([2.0, 1.0, 5.0, 6.0], each=2, tasks=["a", "a", "b", "b"])
    found = summarize(tuned, base)
    assert (found["images"], found["prompts"]) == (4, 2)
    assert found["rewards"]["clip"]["mean"] == 3.5
    # the two prompts' means are 1.5 and 5.5; resampling two of two gives 1.5, 3.5 or 5.5
    assert (found["rewards"]["clip"]["low"], found["rewards"]["clip"]["high"]) == (1.5, 5.5)
    against = found["against_base"]["clip"]
    assert against["win_rate"] == 0.75 and against["difference"]["mean"] == 1.0
    assert found["tasks"]["b"] == {"images": 2, "clip": {"mean": 5.5, "low": None, "high": None}}
    assert 0 < found["metrics"]["diversity"] < 1 and found["metrics"]["sharpness"] > 0
    text = to_markdown("Evaluation", {"after": found})
    assert "| clip | 3.5 [1.5, 5.5] | 1 [0, 2] | 75.0% [" in text
    assert "| b | 2 | 5.5 |" in text
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_intervals_of_a_summary_are_over_prompts():
    # Every prompt has the mean 5, and two of the three win, whichever image one looks at.
    base = evaluation(np.tile([0.0, 10.0], 6), each=4)
    tuned = evaluation(base.total + np.repeat([1.0, -2.0, 1.0], 4), each=4)
    found = summarize(base)["rewards"]["clip"]
    assert found == {"mean": 5.0, "low": 5.0, "high": 5.0}
    against = summarize(tuned, base)["against_base"]["clip"]
    wilson = binomtest(2, 3).proportion_ci(method="wilson")
    interval = against["win_rate_low"], against["win_rate_high"]
    np.testing.assert_allclose(interval, [wilson.low, wilson.high], rtol=1e-9)


def test_wins_are_counted_the_way_that_is_better():
    base, tuned = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 5.0, 4.0]  # two are higher, one lower, one equal
    for lower, wins in (((), "62.5%"), (("clip",), "37.5%")):
        found = summarize(evaluation(tuned, lower=lower), evaluation(base, lower=lower))
        against = found["against_base"]["clip"]
        assert f"{against['win_rate']:.1%}" == wins and against["difference"]["mean"] == 0.5
        assert against["win_rate_low"] < against["win_rate"] < against["win_rate_high"]
        assert wins in to_markdown("Evaluation", {"after": found})


def test_a_single_image_has_no_error_and_no_diversity():
    found = summarize(evaluation([1.0]))
    assert found["metrics"]["reward/standard_error"] is None and "diversity" not in found["metrics"]
    assert "| clip | 1 |" in to_markdown("Evaluation", {"after": found})


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    board = TensorBoard(tmp_path)
    board.scalars(1, {"reward/mean": np.float32(0.25), "kl": 1})
    board.scalars(2, {"reward/mean": 0.5})
    board.close()
    time.sleep(1.1)  # its files are read in the order of their names, which have whole seconds
    resumed = TensorBoard(tmp_path, start=1)
    resumed.scalars(2, {"reward/mean": 0.75})
    resumed.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("reward/mean")] == [(1, 0.25), (2, 0.75)]
    assert "kl" in read.Tags()["scalars"]


def test_tensorboard_hides_what_a_run_logged_that_begins_anew(tmp_path):
    board = TensorBoard(tmp_path)  # killed before its first checkpoint
    for step in range(3):
        board.scalars(step, {"reward/mean": 0.25})
    board.close()
    time.sleep(1.1)
    again = TensorBoard(tmp_path)
    for step in range(2):
        again.scalars(step, {"reward/mean": 0.75})
    again.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in read.Scalars("reward/mean")] == [(0, 0.75), (1, 0.75)]


def test_a_resumed_run_does_not_log_its_untrained_model_again(tmp_path):
    for start, value in ((0, 0.25), (2, 0.75)):
        with Recorder(config(tmp_path), tmp_path, start=start) as recorder:
            recorder.evaluation(0, evaluation([0.25, 0.25]))
            recorder.metrics(start, {"reward/mean": value})
            time.sleep(1.1)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in read.Scalars("eval/reward/mean")] == [0]
    assert [(e.step, e.value) for e in read.Scalars("reward/mean")] == [(1, 0.25), (3, 0.75)]
    assert len(read.Images("eval/images")) == 1


@pytest.mark.parametrize("ended", [True, False], ids=["made longer", "stopped within it"])
def test_trackers_have_an_evaluation_once_that_is_done_anew(ended, tmp_path):
    row = {"reward/mean": 0.25}
    with Recorder(config(tmp_path), tmp_path) as recorder:
        recorder.evaluation(0, evaluation([0.25, 0.25]))
        recorder.metrics(1, row)
        if ended:
            recorder.evaluation(2, evaluation([0.5, 0.5]), last=True)
    time.sleep(1.1)
    with Recorder(config(tmp_path), tmp_path, start=2, evaluated=False) as recorder:
        recorder.evaluation(0, evaluation([0.25, 0.25]))
        recorder.evaluation(2, evaluation([0.5, 0.5]))
        recorder.metrics(1, row | {"eval/reward/mean": 0.5}, known=row)
        recorder.metrics(2, row)
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("eval/reward/mean")] == [(0, 0.25), (2, 0.5)]
    assert [e.step for e in read.Scalars("reward/mean")] == [2, 3]
    assert [e.step for e in read.Images("eval/images")] == [0, 2]


def test_tensorboard_has_histograms_and_pictures(tmp_path):
    board = TensorBoard(tmp_path)
    board.histogram(2, "reward/distribution", np.array([0.0, 1.0, 1.0, 4.0]))
    board.picture(2, "eval/images", Image.new("RGB", (6, 4), "red"))
    board.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    (histogram,) = read.Histograms("reward/distribution")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (
        2,
        4,
        6,
    )
    assert sum(histogram.histogram_value.bucket) == 4 and histogram.histogram_value.max == 4
    (picture,) = read.Images("eval/images")
    assert (picture.width, picture.height) == (6, 4)
    assert Image.open(io.BytesIO(picture.encoded_image_string)).getpixel((0, 0)) == (255, 0, 0)


def test_weights_and_biases_keeps_a_run_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = Config(run=RunConfig(wandb_project="mine", tensorboard="off"))
    (tracker,) = make_trackers(settings, tmp_path)
    tracker.scalars(1, {"reward/mean": 0.25})
    tracker.histogram(1, "reward/distribution", np.arange(4.0))
    tracker.picture(1, "eval/images", Image.new("RGB", (6, 4), "red"))
    tracker.close()
    (file,) = tmp_path.rglob("*.wandb")
    names = (b"reward/mean", b"reward/distribution", b"eval/images", b"iterations")
    # Offline, wandb's own process may still be writing when a run has finished.
    until = time.monotonic() + 60
    while missing := [name for name in names if name not in file.read_bytes()]:
        assert time.monotonic() < until, missing
        time.sleep(0.2)
    assert (tmp_path / "wandb_id").read_text() in file.name


def test_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers(Config())  # "auto" does without
    for field, package in (
        ({"tensorboard": "on"}, "tensorboard"),
        ({"wandb_project": "mine"}, "wandb"),
    ):
        with pytest.raises(UsageError, match=rf"not installed: pip install '{package}>="):
            check_trackers(Config(run=RunConfig(**field)))


def test_patience_without_gold_is_refused():
    with pytest.raises(UsageError, match="eval.patience is 2; expected 0"):
        EvalConfig(patience=2, every=5)


def test_images_that_a_reward_failed_on_are_recorded_without_a_score(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    scores = np.array([0.5, np.nan, np.nan, 1.0], np.float32)
    with Recorder(config(tmp_path), tmp_path) as recorder:
        for number, values in enumerate((scores, scores * np.nan)):
            recorder.rollout(number, images, list("aabb"), {"total": values}, values, 2)
        assert recorder.gallery.entries("rollout")[0].scores["total"] == [0.5, None, None, 1.0]
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (histogram,) = read.Histograms("reward/distribution")
    assert histogram.histogram_value.num == 2
