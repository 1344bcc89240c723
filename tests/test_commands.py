"""The commands that look at models and runs, on a checkpoint that Diffusers itself wrote."""

import json
import os
import re
import threading
import urllib.error
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo import cli
from diffusion_grpo.cli import main
from diffusion_grpo.commands.view import make_server
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery
from diffusion_grpo.metrics import metric_meanings, read_metrics
from diffusion_grpo.pipeline import generate
from diffusion_grpo.plan import USABLE
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.report import report_data
from diffusion_grpo.run_models import find_model, reward_options


def read(path):
    """Read a picture and close its file."""
    with Image.open(path) as image:
        image.load()
        return image


def frames(path):
    with Image.open(path) as image:
        return image.n_frames, image.size


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("commands") / "pipeline", **TWO_LEVELS)


@pytest.fixture(scope="module")
def run_dir(checkpoint, tmp_path_factory):
    """A run of two iterations, evaluated before, between and after."""
    folder = tmp_path_factory.mktemp("run")
    prompts = folder / "prompts.jsonl"
    lines = [{"prompt": text, "task": "one"} for text in ("a <b>red</b> circle", "a blue square")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = folder / "judge.py"
    judge.write_text(
        "def score(images, prompts, metadata):\n"
        "    return images.mean((1, 2, 3)).astype('float32')\n\n\n"
        "score.name = 'brightness'\n"
    )
    options = {
        "--model": checkpoint,
        "--prompts": prompts,
        "--prompts.heldout": prompts,
        "--reward.rewards": "jpeg_size",
        "--eval.gold": f"{judge}:score=-2",
        "--run.log-every": 3,
        "--rollout.prompts-per-iteration": 2,
        "--rollout.images-per-prompt": 2,
        "--rollout.num-steps": 2,
        "--rollout.microbatch": 4,
        "--rollout.guidance-scale": 2,
        "--grpo.microbatch": 2,
        "--grpo.beta": 0.1,
        "--optim.learning-rate": 0.05,
        "--eval.every": 1,
        "--eval.images-per-prompt": 2,
        "--eval.num-steps": 2,
        "--eval.stochastic": "True",
        "--iterations": 2,
        "--output": folder / "run",
    }
    assert main(["train", *(str(word) for pair in options.items() for word in pair)]) == 0
    return folder / "run"


def test_a_run_records_what_its_page_shows(run_dir):
    gallery = Gallery(run_dir)
    assert [entry.iteration for entry in gallery.entries("evaluation")] == [0, 1, 2]
    rollouts = gallery.entries("rollout")
    assert [entry.iteration for entry in rollouts] == [0, 1]
    first = rollouts[0]
    assert first.group == 2 and len(first.prompts) == 4 and first.advantages is not None
    np.testing.assert_allclose(np.reshape(first.advantages, (2, 2)).sum(axis=1), 0, atol=1e-3)
    page = (run_dir / "report.html").read_text()
    assert "a \\u003cb>red\\u003c/b> circle" in page and "<b>red" not in page
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["after"]["against_base"]["jpeg_size"]["win_rate"] in np.arange(9) / 8
    assert found["after"]["tasks"]["one"]["images"] == 4
    # Nothing is trained yet, but XLA may round the network with an adapter of zeros otherwise.
    assert abs(found["before"]["metrics"]["kl"]) < 1e-9 < found["after"]["metrics"]["kl"]
    best = json.loads((run_dir / "best.json").read_text())
    assert (run_dir / "best").is_dir() == (best["model"] == "best/")
    # the gold reward is found under the name that it gives itself, and less of it is better
    means = [float(np.mean(entry.numbers("brightness"))) for entry in gallery.entries("evaluation")]
    assert best["by"] == ["brightness"] and best["mean"] == pytest.approx(-min(means), rel=1e-4)
    assert report_data([run_dir])["runs"][0]["gold"] == ["brightness"]
    # an evaluation writes its line, whatever run.log_every says, and so does the last iteration
    assert [row["iteration"] for row in read_metrics(run_dir)] == [0, 1]
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/reward/mean")] == [0, 1, 2]


def test_every_metric_that_a_run_writes_is_in_the_table(run_dir):
    known = metric_meanings()
    written = {name for row in read_metrics(run_dir) for name in row} - {"iteration"}
    names = re.compile("reward/(jpeg_size|brightness)")
    general = {name: names.sub("reward/<name>", name) for name in written}
    unknown = {
        name
        for name, text in general.items()
        if text not in known and text.removeprefix("eval/") not in known
    }
    assert unknown == set()
    assert {"eval/kl", "eval/diversity", "time/evaluate", "eval/sharpness"} <= written


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", DDIMScheduler),
        ("dpm++", DPMSolverMultistepScheduler),
        ("euler", EulerDiscreteScheduler),
    ],
)
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_final_image_equals_that_of_diffusers(checkpoint, sampler, scheduler):
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a red circle", "two green stars"]
    expected = pipe(
        prompts, num_inference_steps=6, guidance_scale=3.0, latents=latents, output_type="np"
    ).images
    ours = generate(
        StableDiffusion.from_pretrained(checkpoint),
        prompts,
        num_steps=6,
        guidance_scale=3.0,
        sampler=sampler,
        latents=jnp.asarray(latents.permute(0, 2, 3, 1).numpy()),
    )
    assert expected.std() > 0.01
    assert np.abs(ours.astype(float) - 255 * expected).max() <= 2


def test_previews_lead_to_the_final_image(checkpoint):
    previews = []
    final = generate(
        StableDiffusion.from_pretrained(checkpoint),
        ["a red circle", "a star", "a cross"],
        num_steps=4,
        sampler="euler",
        batch_size=2,
        on_previews=previews.append,
    )
    assert [part.shape for part in previews] == [(4, 2, 32, 32, 3), (4, 1, 32, 32, 3)]
    steps = np.concatenate(previews, axis=1).astype(int)
    # Euler's last step ends at the prediction itself
    assert np.abs(steps[-1] - final).max() <= 1
    assert np.abs(steps[0] - final).max() > 1


def test_sample_writes_grid_singles_and_animation(checkpoint, tmp_path, capsys):
    words = ["--model", checkpoint, "--prompt", "a red circle", "a star/moon", "--num-images", 3]
    words += ["--num-steps", 2, "--seed", 5, "--sampler", "euler", "--batch-size", 4]
    words += ["--output", tmp_path / "grid.webp", "--singles", tmp_path / "singles"]
    words += ["--animate", tmp_path / "steps.webp", "--font-size", 30, "--cell-size", 24, "--quiet"]
    assert main(["sample", *map(str, words)]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and len(shown.out.splitlines()) == 8
    grid = read(tmp_path / "grid.webp")
    made = json.loads(grid.getexif()[0x010E])
    assert made["sampler"] == "euler" and made["prompt"] == "a red circle\na star/moon"
    assert grid.height > 2 * (24 + 30) and grid.width < 200
    singles = sorted((tmp_path / "singles").iterdir())
    assert [path.name for path in singles][4] == "0001_001_a_star_moon.png"
    text = read(singles[4]).text
    assert text["prompt"] == "a star/moon" and text["image"] == "1" and text["num_steps"] == "2"
    assert text["prompt_number"] == "1" and text["dtype"] == "float32"
    assert frames(tmp_path / "steps.webp")[1] == grid.size

    # the same picture whatever the batch size, and alone
    again = ["--model", checkpoint, "--prompt", "a red circle", "--num-images", 2]
    again += ["--num-steps", 2, "--seed", 5, "--sampler", "euler", "--batch-size", 1]
    again += ["--output", "None", "--singles", tmp_path / "again"]
    assert main(["sample", *map(str, again)]) == 0
    first = [np.asarray(read(p), float) for p in sorted((tmp_path / "again").iterdir())]
    for ours, path in zip(first, singles[:2], strict=True):
        assert np.abs(ours - np.asarray(read(path), float)).max() <= 1


@pytest.mark.parametrize(("option", "name"), [("--animate", "a.webp"), ("--output", "a.jpg")])
def test_a_grid_that_its_file_cannot_hold_is_refused_before_it_is_drawn(
    option, name, checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("diffusion_grpo.pipeline.generate", lambda *_, **__: pytest.fail("drawn"))
    words = ["--model", checkpoint, "--prompt", "a red circle", "--num-images", 500, "--quiet"]
    words += [] if option == "--output" else ["--output", "None"]
    assert main(["sample", *map(str, words), option, str(tmp_path / name)]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "pixels are more than" in told and "--cell-size" in told and "--columns" in told


def test_a_contact_sheet_of_hundreds(checkpoint, tmp_path):
    words = ["--model", checkpoint, "--prompts", "{color} {animal}", "--num-prompts", 120]
    words += ["--num-images", 2, "--num-steps", 1, "--columns", 20, "--cell-size", 32]
    words += ["--font-size", 0, "--batch-size", 48, "--output", tmp_path / "sheet.jpg"]
    assert main(["sample", *map(str, words)]) == 0
    sheet = read(tmp_path / "sheet.jpg")
    assert sheet.format == "JPEG" and 20 * 32 < sheet.width < 20 * 60 and sheet.height < sheet.width


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--prompt", "a", "--sampler", "eular"], "did you mean 'euler'"),
        (["sample", "--prompt", "a", "--sampler", "euler", "--eta", "1"], "only the sampler ddim"),
        (["sample"], "give the prompts by --prompt"),
        (["sample", "--prompt", "a", "--output", "None"], "nothing to write"),
        (["sample", "--prompt", "a", "--output", "a.gif"], "does not end in one of .png, .webp"),
        (["sample", "--prompt", "a", "--animate", "a.png"], "expected a name that ends in .webp"),
        (["sample", "--prompt", "a", "--num-images", "0"], "num_images is 0; expected 1 or more"),
        (["sample", "--prompt", "a", "--quiet", "--verbose"], "opposites"),
        (["compare", "shapes-diffusion"], "1 models; expected two to four, or one run"),
        (["compare", "a", "b", "--strip", "s.png"], "show one run"),
        (["compare", "nowhere", "--strip", "s.png"], "'nowhere' holds no run"),
        (
            ["compare", "a", "--strip", "s.png", "--reward=clip", "--num_images", "2"],
            "--num-images, --reward has no effect with --strip or --animation",
        ),
        (["compare", "a", "--animation", "s.webp", "--output", "b.png"], "--output has no effect"),
        (["compare", "a", "b", "--num-steps", "0", "--prompt", "c"], "num_steps is 0; expected 1"),
        (["evaluate", "shapes-diffusion", "--num-steps", "0"], "num_steps is 0; expected 1"),
        (["bench", "sd15", "--variant", "fp16"], "measured with random weights; give --model"),
        (["evaluate", "shapes-diffusion", "--output", "a.txt"], "does not end in .json"),
        (["evaluate", "shapes-diffusion", "--samplers", "dim"], "did you mean 'ddim'"),
        (["report", "nowhere"], "holds no run"),
        (["view", "nowhere"], "holds no run"),
        (["view", "nowhere", "--port", "99999"], "port is 99999"),
        (["vew", "nowhere"], "did you mean 'view'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_code_2(words, message, capsys):
    assert main(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_compare_shows_base_and_tuned_with_their_rewards(run_dir, tmp_path, capsys):
    path = tmp_path / "compare.png"
    words = ["compare", run_dir, "--reward", "jpeg_size", "--num-steps", 2, "--output", path]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().err.replace(str(run_dir), "run")
    assert "mean reward: run@base " in said
    assert "guidance scale 2, 2 steps of ddim, clip skip 0, as run says but for what" in said
    picture = read(path)
    assert picture.text["rewards"] == '["jpeg_size"]' and picture.text["num_steps"] == "2"
    pixels = np.asarray(picture).reshape(-1, 3)
    marks = [(pixels == color).all(axis=1).sum() for color in ((17, 115, 75), (179, 55, 42))]
    assert sum(marks) > 10  # the differences are written in green or red
    assert main(["compare", f"{run_dir}@last", str(run_dir), "--prompt", "a"]) == 2
    assert "models final, best and base" in capsys.readouterr().err


def test_time_lapse_is_drawn_from_what_the_run_recorded(run_dir, tmp_path):
    strip, animation = tmp_path / "strip.png", tmp_path / "lapse.webp"
    words = ["compare", run_dir, "--strip", strip, "--animation", animation]
    assert main([str(word) for word in words]) == 0
    drawn = np.asarray(read(strip))
    for entry in Gallery(run_dir).entries("evaluation"):
        tile = Gallery(run_dir).images(entry)[0]
        factor = -(-128 // min(tile.shape[:2]))
        large = np.asarray(
            Image.fromarray(tile).resize(
                (tile.shape[1] * factor, tile.shape[0] * factor), Image.Resampling.LANCZOS
            )
        )
        corners = np.argwhere((drawn == large[0, 0]).all(axis=-1))
        height, width = large.shape[:2]
        assert any(
            (
                drawn[y : y + height, x : x + width].shape == large.shape
                and (drawn[y : y + height, x : x + width] == large).all()
            )
            for y, x in corners
        )
    assert frames(animation)[0] == 3


def test_an_animation_that_cannot_be_written_is_refused_before_the_strip_is(
    run_dir, tmp_path, capsys
):
    words = ["compare", str(run_dir), "--strip", str(tmp_path / "s.png")]
    assert main([*words, "--animation", str(tmp_path / "lapse.png")]) == 2
    assert "expected a name that ends in .webp" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_compare_refuses_a_page_its_file_cannot_hold_before_anything_is_drawn(
    run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("diffusion_grpo.images._LONGEST", {"WEBP": 300})
    monkeypatch.setattr("diffusion_grpo.pipeline.generate", lambda *_, **__: pytest.fail("drawn"))
    words = ["compare", run_dir, "--num-steps", 2, "--output", tmp_path / "page.webp"]
    assert main([str(word) for word in words]) == 2
    assert "compare fewer with --num-prompts" in capsys.readouterr().err


def test_evaluate_compares_with_the_base_and_measures_the_kl(run_dir, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    words = ["evaluate", run_dir, "--base", f"{run_dir}@base", "--reward", "jpeg_size"]
    words += ["--num-steps", 2, "--output", path]
    assert main([str(word) for word in words]) == 0
    found = json.loads(path.read_text())
    assert found["prompts"] == "what the run held out"
    found = found["samplers"]
    assert list(found) == ["ddim", "ddim, base", "ddpm", "ddpm, base"]
    assert found["ddim"]["metrics"]["kl"] > 0 and found["ddim"]["images"] == 4
    ours, base = (found[name]["rewards"]["jpeg_size"]["mean"] for name in ("ddim", "ddim, base"))
    difference = found["ddim"]["against_base"]["jpeg_size"]["difference"]["mean"]
    np.testing.assert_allclose(difference, ours - base, rtol=1e-6)
    assert "| jpeg_size |" in path.with_suffix(".md").read_text()
    assert "## ddpm, base" in capsys.readouterr().err


def test_evaluate_gives_rewards_the_images_of_a_prompt_as_a_group(run_dir, tmp_path):
    reward = tmp_path / "place.py"
    reward.write_text(
        "from diffusion_grpo.reward import of_group\n\n"
        "@of_group\ndef place(images, prompts, metadata):\n"
        "    assert len(images) == 3 and len(set(prompts)) == 1\n    return [0.0, 1.0, 5.0]\n"
    )
    path = tmp_path / "numbers.json"
    words = ["evaluate", run_dir, "--reward", reward, "--num-steps", 2, "--samplers", "ddim"]
    words = [*map(str, words), "--prompts", str(run_dir.parent / "prompts.jsonl")]
    assert main([*words, "--num-images", "3", "--output", str(path)]) == 0
    assert json.loads(path.read_text())["samplers"]["ddim"]["rewards"]["place"]["mean"] == 2.0


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_rewards_are_asked_before_anything_is_drawn(command, run_dir, tmp_path, capsys):
    (tmp_path / "place.py").write_text(
        "from diffusion_grpo.reward import of_group\n\n"
        "@of_group\ndef place(images, prompts, metadata):\n    return [0.0] * len(images)\n"
    )
    output = tmp_path / ("n.json" if command == "evaluate" else "n.png")
    words = [command, run_dir, "--reward", tmp_path / "place.py", "--num-images", 1]
    words += ["--prompts", run_dir.parent / "prompts.jsonl", "--output", output]
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "num_images is 1, but reward 'place' compares" in said and "images/s" not in said


def test_report_is_written_where_it_is_asked_for(run_dir, tmp_path, capsys):
    path = tmp_path / "both.html"
    assert main(["report", str(run_dir), str(run_dir), "--output", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text().startswith("<!doctype html>")


def test_view_serves_the_run_to_this_machine_alone(run_dir):
    server = make_server([str(run_dir)])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"

        def get(path, **headers):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.headers, answer.read()

        assert b"<!doctype html>" in get("/")[1]
        headers, body = get("/data.json")
        source = json.loads(body)["runs"][0]["evaluations"][0]["source"]
        kind, sheet = get("/" + source)
        assert kind["Content-Type"] == "image/webp" and sheet[8:12] == b"WEBP"
        for path, fields, code in [
            ("/data.json", {"If-None-Match": headers["ETag"]}, 304),
            ("/", {"Host": "example.com:80"}, 403),
            ("/sheet/0/missing.webp", {}, 404),
            ("/sheet/0/../config.yaml", {}, 404),
            ("/sheet/7/evaluation_00000.webp", {}, 404),
        ]:
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(path, **fields)
            assert refused.value.code == code
            refused.value.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_metrics_are_listed_with_their_meaning(capsys):
    assert main(["list", "metrics"]) == 0
    shown = capsys.readouterr().out
    assert "clip_fraction" in shown and "jpeg_kilobytes" in shown


def test_a_run_is_scored_with_its_own_options_of_a_reward(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    options = ("clip.model=mine", "clip.prompt_prefix=a photo of ", "shapes.partial_credit=false")
    reward = {"rewards": ["clip=1.0"], "options": list(options)}
    config = {"reward": reward, "eval": {"gold": ["shapes"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = [str(tmp_path / "no_run"), f"{run}@base"]
    assert reward_options(words, ["clip=0.5"], []) == options[:2]
    assert reward_options(words, ["jpeg_size"], []) == ()
    assert reward_options(words, ["clip"], ["clip.model=other"]) == ("clip.model=other", options[1])
    assert reward_options(words, ["shapes"], []) == options[2:]
    # The user's own file is not the built-in reward of its name.
    assert reward_options(words, ["my/clip.py"], []) == ()


def test_a_run_without_a_model_says_how_to_get_one(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match=r"no final/; .*--resume \S+`.* export \S+@N .*FOLDER`$"):
        find_model(str(tmp_path))
    for step in (12, 3):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    with pytest.raises(UsageError, match=r"FOLDER` \(N: 3, 12\)$"):
        find_model(str(tmp_path))
    with pytest.raises(UsageError, match="no best/; expected a run with --eval.every"):
        find_model(f"{tmp_path}@best")


def test_of_a_gpu_s_memory_as_much_is_asked_for_as_plan_counts_on(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setenv(name, "0.5")
    cli._prepare_jax()
    assert os.environ[name] == "0.5"  # the user's own stays
    monkeypatch.delenv(name)
    cli._prepare_jax()
    assert float(os.environ[name]) == USABLE
