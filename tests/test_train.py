"""The run on a checkpoint that Diffusers itself wrote, with random weights.

It is the code path of any checkpoint.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from compiling import as_users_compile
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.numpy import load_file
from tiny_run import lasting
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.config import load_config
from diffusion_grpo.errors import Preempted, UsageError
from diffusion_grpo.evaluate import Evaluator
from diffusion_grpo.events import read_events
from diffusion_grpo.metrics import read_metrics
from diffusion_grpo.pipeline import generate
from diffusion_grpo.preparation import make_directory
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.prompts import Prompt
from diffusion_grpo.rollout import sample, trajectory_log_probs
from diffusion_grpo.sampling import SamplingDefaults, read_sampling, write_sampling
from diffusion_grpo.schedule import make_schedule
from diffusion_grpo.train import lay_out, train

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("train") / "pipeline", **TWO_LEVELS)


def _flags(checkpoint, folder):
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue square\ntwo green stars\n")
    return {
        "--model": str(checkpoint),
        "--prompts.train": str(prompts),
        "--prompts.heldout": str(prompts),
        "--reward.rewards": "jpeg_size",
        "--rollout.prompts-per-iteration": "2",
        "--rollout.images-per-prompt": "2",
        "--rollout.num-steps": "3",
        "--rollout.microbatch": "4",
        "--rollout.negative-prompt": "a blurry picture",
        "--grpo.microbatch": "2",
        "--grpo.beta": "0.1",
        "--eval.num-prompts": "2",
        "--eval.num-steps": "2",
        "--run.iterations": "2",
        "--run.sample-every": "2",
        "--run.output": str(folder / "run"),
    }


@pytest.fixture
def flags(checkpoint, tmp_path):
    return _flags(checkpoint, tmp_path)


def _words(flags):
    return [word for pair in flags.items() for word in pair]


def _config(flags, **changed):
    flags = flags | {
        f"--{k.replace('__', '.').replace('_', '-')}": str(v) for k, v in changed.items()
    }
    return load_config(None, _words(flags))


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    """Train undisturbed; returns the directory of the run."""
    runs = {}

    def run(trainable):
        if trainable not in runs:
            flags = _flags(checkpoint, tmp_path_factory.mktemp("finished"))
            assert main(["train", *_words(flags | {"--model.trainable": trainable})]) == 0
            runs[trainable] = Path(flags["--run.output"])
        return runs[trainable]

    return run


@pytest.mark.parametrize("trainable", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_checkpoint_written_by_diffusers_is_trained_and_loads_back(
    finished, checkpoint, trainable
):
    directory = finished(trainable)
    rows = read_metrics(directory)
    assert [row["iteration"] for row in rows] == [0, 1]
    for name in (
        "reward/mean",
        "reward/jpeg_size/std",
        "kl",
        "ratio/max",
        "clip_fraction",
        "grad_norm",
    ):
        assert np.isfinite(rows[-1][name])
    assert rows[0]["kl"] >= 0 and rows[-1]["kl"] > 0
    said = [event["text"] for event in read_events(directory)]
    assert sum("2 of the 2 held-out prompts are trained on too" in text for text in said) == 1
    assert (
        yaml.safe_load((directory / "config.yaml").read_text())["model"]["trainable"] == trainable
    )
    for name in ("before", "after", "before_after", "iteration_00002"):
        Image.open(directory / "samples" / f"{name}.png").verify()
    evaluation = json.loads((directory / "evaluation.json").read_text())
    assert evaluation["images"] == 2 and "difference" in evaluation["rewards"]["jpeg_size"]
    assert list(evaluation["rewards"]) == ["jpeg_size"]  # a lone reward is its own total

    page = (Path(__file__).parents[1] / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    table = page.partition("| always | what |")[2].partition("\n\n")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in row.split(", ")}
    there = {f"`{path.name}{'/' * path.is_dir()}`" for path in directory.iterdir()}
    assert len(listed) == 12 and listed <= there
    assert there - listed <= {"`report.html`", "`tensorboard/`", "`.lock`"}

    # the exported pipeline: Diffusers loads it, and it is the same network but for what was trained
    StableDiffusionPipeline.from_pretrained(directory / "final")
    own = SamplingDefaults(5.0, 2, negative_prompt="a blurry picture")
    assert read_sampling(directory / "final") == own
    before, after = load_file(checkpoint / UNET), load_file(directory / "final" / UNET)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    if trainable == "lora":
        assert changed and all(".attn" in name and "weight" in name for name in changed)
    else:
        assert len(changed) > 0.9 * len(before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_deterministic_images_equal_those_of_diffusers(tmp_path, prediction_type):
    directory = write_pipeline(tmp_path / "pipeline", prediction_type=prediction_type, **TWO_LEVELS)
    pipe = StableDiffusionPipeline.from_pretrained(directory)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "two green stars", "a blue square"]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe(
        prompts,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=latents,
        eta=0.0,
        output_type="np",
    ).images
    ours = generate(
        StableDiffusion.from_pretrained(directory),
        prompts,
        num_steps=6,
        guidance_scale=3.0,
        latents=jnp.asarray(latents.permute(0, 2, 3, 1).numpy()),
        batch_size=2,
    )
    assert expected.std() > 0.01
    assert np.abs(ours.astype(float) - 255 * expected).max() <= 2


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(checkpoint):
    model = StableDiffusion.from_pretrained(checkpoint)
    together = generate(model, ["a red circle"] * 5, num_steps=3, seed=4, batch_size=4)
    alone = generate(model, ["a red circle"], num_steps=3, seed=4, image_index=[3])
    assert np.abs(together[3].astype(int) - alone[0].astype(int)).max() <= 1
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 10


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        # The second iteration is done anew: it was being sampled, or was about to be learned from.
        pytest.param("train", "decoded_and_scored", 1, marks=pytest.mark.slow),
        ("train", "image_advantages", 1),
        # The first one is finished: at its second update the state was no more what it had been.
        pytest.param("learning", "choose_steps", 1, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_as_the_undisturbed_one(
    module, name, call, flags, finished, monkeypatch, capsys
):
    # After one iteration of two, the other depends on the optimizer's moments.
    import diffusion_grpo.learning
    import diffusion_grpo.train

    calls = []

    def interrupted(*args, **kw):
        calls.append(1)
        if len(calls) == call + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kw)

    directories = finished("lora"), Path(flags["--run.output"])
    where = getattr(diffusion_grpo, module)
    original = getattr(where, name)
    monkeypatch.setattr(where, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(_config(flags))
    monkeypatch.undo()
    assert len(calls) == call + 1
    assert [row["iteration"] for row in read_metrics(directories[1])] == [0]
    assert [event["text"].split(" ")[0] for event in read_events(directories[1])][-1] == "ended"
    assert main(["train", "--resume", str(directories[1])]) == 0
    texts = [event["text"] for event in read_events(directories[1])]
    assert texts[0] == "begun" and texts[-1] == "finished" and "resumed after 1 iterations" in texts
    first, second = (load_file(directory / "final" / UNET) for directory in directories)
    assert all((first[name] == second[name]).all() for name in first)
    for a, b in zip(*map(read_metrics, directories), strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k and k != "images_per_second"} == {
            k: v for k, v in b.items() if "time/" not in k and k != "images_per_second"
        }


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_is_done_anew(flags, tmp_path, monkeypatch):
    flags |= {"--eval.every": "1"}
    stopped, whole = Path(flags["--run.output"]), tmp_path / "whole"
    train(_config(flags | {"--run.output": str(whole)}))
    calls, drawn = [], Evaluator._drawn

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:  # the first one is of the untrained model
            os.kill(os.getpid(), signal.SIGTERM)
        return drawn(*args)

    monkeypatch.setattr(Evaluator, "_drawn", interrupted)
    with pytest.raises(Preempted):
        train(_config(flags))
    monkeypatch.undo()
    rows = read_metrics(stopped)
    assert [row["iteration"] for row in rows] == [0] and "eval/reward/mean" not in rows[0]
    assert main(["train", "--resume", str(stopped)]) == 0
    rows = [lasting(directory) for directory in (whole, stopped)]
    assert "eval/reward/mean" in rows[0][0] and rows[0] == rows[1]
    first, second = (load_file(directory / "final" / UNET) for directory in (whole, stopped))
    assert all((first[name] == second[name]).all() for name in first)
    assert (whole / "best.json").read_text() == (stopped / "best.json").read_text()


def test_a_run_that_is_made_longer_is_finished_no_more(flags):
    directory = Path(flags["--run.output"])
    with make_directory(_config(flags), directory):
        (directory / "evaluation.json").write_text("{}")
        (directory / "checkpoints" / "2").mkdir(parents=True)
    with make_directory(_config(flags), directory, resume=True):
        assert (directory / "evaluation.json").is_file()
    with make_directory(_config(flags, run__iterations=5), directory, resume=True):
        assert not (directory / "evaluation.json").exists()
    # Of a finished run without its checkpoints nothing is taken away.
    (directory / "final").mkdir()
    (directory / "checkpoints" / "2").rmdir()
    with pytest.raises(UsageError, match=r"finished run \(final\).*no checkpoint to go on from"):
        make_directory(_config(flags, run__iterations=5), directory, resume=True)
    written = load_config(str(directory / "config.yaml"))
    assert written == _config(flags, run__iterations=5)


@pytest.mark.slow
def test_a_finished_run_that_is_made_longer_ends_as_one_that_was_as_long(flags, capsys):
    directory = Path(flags["--run.output"])
    flags |= {"--eval.every": "1"}
    train(_config(flags))
    assert main(["train", "--resume", str(directory), "--iterations", "1"]) == 2
    assert "a run of 2; expected more" in capsys.readouterr().err
    assert main(["train", "--resume", str(directory), "--seed", "1"]) == 2
    assert "no other option but --iterations N" in capsys.readouterr().err
    assert main(["train", "--resume", str(directory), "--iterations", "3"]) == 0
    assert yaml.safe_load((directory / "config.yaml").read_text())["run"]["iterations"] == 3
    assert len(read_metrics(directory)) == 3
    whole = directory.with_name("whole")
    train(_config(flags | {"--run.output": str(whole)}, run__iterations=3))
    first, second = (load_file(folder / "final" / UNET) for folder in (directory, whole))
    assert all((first[name] == second[name]).all() for name in first)
    assert lasting(directory) == lasting(whole)
    assert (directory / "best.json").read_text() == (whole / "best.json").read_text()
    assert (directory / "best").is_dir() == (whole / "best").is_dir()


FAILING = """
calls = 0

def brightness(images, prompts, metadata):
    global calls
    calls += 1
    if calls == {fails_at}:
        raise ValueError("the lamp is broken")
    return images.mean(axis=(1, 2, 3))
"""


@pytest.mark.slow
def test_iterations_outlive_a_reward_that_fails(flags, tmp_path, capsys):
    reward, directory = tmp_path / "brightness.py", tmp_path / "run"
    flags |= {"--reward.rewards": str(reward), "--eval.every": "1", "--run.iterations": "3"}
    flags |= {"--grpo.beta": "0", "--grpo.updates-per-rollout": "1"}

    # Calls 1 to 3: the first evaluation, the first iteration, the evaluation after it.
    reward.write_text(FAILING.format(fails_at=3))
    assert main(["train", *_words(flags)]) == 1
    shown = capsys.readouterr()
    assert "evaluating before training on 2 images of the held-out prompts" in "".join(shown)
    message = shown.err
    assert "brightness" in message and "the lamp is broken" in message
    assert f"diffusion-grpo train --resume {directory}" in message
    assert "Traceback" not in message
    assert [row["iteration"] for row in read_metrics(directory)] == [0]

    # Mended, the evaluation is done anew (call 2), and it goes on; call 5 is the third iteration's.
    reward.write_text(FAILING.format(fails_at=5))
    assert main(["train", "--resume", str(directory)]) == 1
    message = capsys.readouterr().err
    assert "iterations kept: 2" in message and "reward 'brightness' was edited" in message
    rows = read_metrics(directory)
    assert [row["iteration"] for row in rows] == [0, 1]
    assert ["eval/reward/mean" in row for row in rows] == [True, True]
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"1", "2"}


def test_log_probs_are_recomputed_exactly_by_the_real_unet(checkpoint):
    from diffusion_grpo.conditioning import encode_prompts
    from diffusion_grpo.pipeline import TrainablePolicy

    model = StableDiffusion.from_pretrained(checkpoint)
    policy = TrainablePolicy(model.unet, 3.0)
    schedule = make_schedule(model.scheduler_config, 4, eta=1.0)
    noise = jax.random.normal(jax.random.key(0), (4, 8, 8, 4))
    keys = jax.random.split(jax.random.key(1), 4)
    conditioning = encode_prompts(model, ["a red circle", "a star", "two crosses", "a square"])
    for storage in (jnp.float32, jnp.bfloat16):
        draw = as_users_compile(
            lambda p, storage=storage: sample(
                policy.denoiser(p, policy.frozen),
                schedule,
                noise,
                keys,
                conditioning,
                storage_dtype=storage,
            )
        )
        again = as_users_compile(
            lambda p, t: trajectory_log_probs(
                policy.denoiser(p, policy.frozen), schedule, t, conditioning, "mean"
            )
        )
        trajectory = draw(policy.trained)
        ratio = jnp.exp(again(policy.trained, trajectory) - trajectory.log_probs)
        assert float(jnp.abs(ratio - 1).max()) == 0.0


def test_a_prompt_that_stands_twice_in_a_batch_gets_two_groups_of_different_noise():
    index, texts, _, image = lay_out([(7, Prompt("a")), (3, Prompt("b")), (7, Prompt("a"))], 2)
    assert index.tolist() == [7, 7, 3, 3, 7, 7] and texts == ["a", "a", "b", "b", "a", "a"]
    assert image.tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"--rollout.images-per-prompt": "1"}, "2 or more"),
        ({"--grpo.microbatch": "3"}, "divisor of 4, the nearest are 2 and 4"),
        ({"--prompts.train": "nowhere.txt"}, "nowhere.txt"),
        ({"--model": "shapes-difusion"}, "did you mean 'shapes-diffusion'"),
        ({"--reward.rewards": "jpg_size"}, "jpeg_size"),
        ({"--grpo.clip-hihg": "1"}, "clip-high"),
        ({"--rollout.eta": "0"}, "eta"),
    ],
)
def test_bad_input_exits_with_2_before_any_work(flags, changed, named, tmp_path, capsys):
    assert main(["train", *_words(flags | changed)]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_empty_prompt_file_is_named(flags, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    assert main(["train", *_words(flags | {"--prompts.train": str(tmp_path / "empty.txt")})]) == 2
    assert "empty.txt: no prompt" in capsys.readouterr().err


def test_directory_of_another_run_is_refused(flags, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="another run.*--resume"):
        train(_config(flags))


def test_unwritable_output_is_refused(flags, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        train(_config(flags, run__output=tmp_path / "file" / "run"))


def test_directory_without_model_index_exits_with_2(flags, checkpoint, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "model_index.json").unlink()
    assert main(["train", *_words(flags | {"--model": str(copy)})]) == 2
    assert "no model_index.json" in capsys.readouterr().err


def test_sample_writes_a_grid_with_its_settings(checkpoint, tmp_path):
    path = tmp_path / "grid.png"
    words = ["--model", str(checkpoint), "--prompt", "a red circle", "a star", "--num-images", "3"]
    assert main(["sample", *words, "--num-steps", "2", "--seed", "5", "--output", str(path)]) == 0
    image = Image.open(path)
    assert image.text["seed"] == "5" and "a star" in image.text["prompt"]
    assert (image.text["num_steps"], image.text["guidance_scale"]) == ("2", "5.0")
    assert image.width > 3 * 128 and image.height > 2 * 128


def test_a_checkpoint_is_sampled_as_it_says_unless_asked_otherwise(checkpoint, tmp_path, capsys):
    assert SamplingDefaults() == SamplingDefaults(guidance_scale=5.0, num_steps=50)
    own = shutil.copytree(checkpoint, tmp_path / "own")
    size = {"height": 64, "width": 96}
    write_sampling(own, SamplingDefaults(1.5, 2, negative_prompt="blue", **size))
    path = tmp_path / "grid.png"
    words = ["--model", str(own), "--prompt", "a star", "--num-images", "1", "--output", str(path)]
    for extra, steps, scale in (([], "2", "1.5"), (["--guidance-scale", "3"], "2", "3.0")):
        assert main(["sample", *words, *extra]) == 0
        image = Image.open(path)
        assert (image.text["num_steps"], image.text["guidance_scale"]) == (steps, scale)
        assert f"guidance scale {float(scale):g}, 2 steps" in capsys.readouterr().err
        assert image.text["negative_prompt"] == "blue"
    said = ["--negative-prompt", "", "--height", "32", "--width", "32", "--guidance-scale", "3"]
    assert main(["sample", *words, *said]) == 0
    other = Image.open(path)
    assert other.text["negative_prompt"] == "" and other.width == image.width - 64


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--num-steps", "0", "num_steps is 0; expected 1 or more"),
        ("--guidance-scale", "-1", "guidance_scale is -1.0; expected 0 or more"),
    ],
)
def test_nonsense_to_sample_with_is_refused_before_a_model_is_read(flag, value, message, capsys):
    assert main(["sample", "--prompt", "a", "--model", "no/model", flag, value]) == 2
    assert message in capsys.readouterr().err


def test_without_pytorch_nothing_is_said_about_it(checkpoint, tmp_path):
    # The tokenizer is read last, after what Transformers is imported for; nothing is compiled.
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    (copy / "tokenizer").mkdir()
    code = (  # Transformers looks for PyTorch with find_spec: as if it were not installed
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "from diffusion_grpo.cli import main\n"
        f"sys.exit(main(['sample', '--prompt', 'a', '--model', {str(copy)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is it a CLIP tokenizer?" in line


def test_resuming_nothing_is_refused(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "config.yaml" in capsys.readouterr().err
