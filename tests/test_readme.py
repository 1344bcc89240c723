"""Every command of the README, in the folder that the README describes.

`path/to/checkpoint` and `runs/demo/final` are a tiny pipeline with random weights that Diffusers
wrote; `contrast.py` and `mine.yaml` are the README's own blocks. The lines run as they are written,
with flags appended that make the run small (the last flag of a name counts).
"""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from flax import nnx
from PIL import Image
from recorded_run import record_run
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.commands.view import make_server
from diffusion_grpo.config import load_config
from diffusion_grpo.lora import attach_lora, lora_factors
from diffusion_grpo.lora_files import FILE, write_lora
from diffusion_grpo.metrics import read_metrics
from diffusion_grpo.pretrained import StableDiffusion

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMAND = r"(?:\.venv/bin/)?diffusion-grpo [^`\n]*?"

TINY = """--rollout.height 32 --rollout.width 32 --rollout.prompts-per-iteration 1
--grpo.best-and-worst None --rollout.images-per-prompt 2
--rollout.num-steps 2 --rollout.microbatch 2 --grpo.microbatch 2
--grpo.updates-per-rollout 1 --grpo.step-weights uniform
--eval.num-prompts 1 --eval.num-steps 2 --iterations 1
--model path/to/checkpoint""".split()
# The gold reward of the demo reads pictures of the embedded world's size only.
DEMO = [*TINY, "--rollout.height", "64", "--rollout.width", "64", "--rollout.window-size", "1"]
# The hub is out of reach: another reward than the preset's CLIP model.
SD15 = [*TINY, "--reward", "jpeg_size"]
TRAIN = {
    "train sd15 --model path/to/checkpoint --prompts my_prompts.txt --output runs/mine": SD15,
    "train mine.yaml --optim.learning-rate 1e-4": SD15,
    "train demo --reward contrast.py --output runs/contrast": DEMO,
    "train demo --reward clip=1.0 contrast.py=0.1 --output runs/both": DEMO,
}
SAMPLE = (
    'sample --model runs/demo/final --prompt "a red circle" --num-images 8 --seed 0 '
    "--output grid.png"
)
CHECK, SERVE = "check-reward contrast.py", "serve-reward contrast.py --port 8000"
SCORE = (
    "score --reward contrast.py sharpness=10 --images pictures --prompts my_prompts.txt "
    "--output scores.csv"
)
# Runs are those that `recorded_run` writes; --quiet leaves the standard error to warnings.
FEW = ["--num-steps", "2", "--batch-size", "4", "--quiet"]
LOOK = {
    "report runs/demo runs/mine --output both.html": [],
    "compare runs/demo --reward clip --output compare.png": [*FEW, "--reward", "jpeg_size"],
    "compare runs/demo --reward shapes_exact --num-prompts 24 --output compare.webp": [
        *FEW,
        "--num-prompts",
        "1",
        "--reward",
        "brightness",
    ],
    "compare runs/demo --strip strip.png --animation lapse.webp": [],
    "evaluate runs/demo --base runs/demo@base --reward clip jpeg_size": [
        *FEW,
        "--reward",
        "jpeg_size",
        "--num-prompts",
        "2",
        "--num-images",
        "1",
    ],
    'sample --model runs/demo --prompts "a {color} star" --sampler dpm++ --singles stars': [
        *FEW,
        "--num-prompts",
        "2",
        "--num-images",
        "1",
    ],
    'sample --model runs/demo --prompt "two red circles" --animate denoising.webp': FEW,
}
# Run as they are, or in parts: `make demo` by its recipe, `pip install` by the extra's name.
EXPORT = "export runs/mine --format lora --dtype float16 --output my-lora"
ADAPTED = 'sample --model path/to/checkpoint --lora my-lora=0.8 --prompt "a red circle"'
PLAN = "plan sd15 --device h100"
OTHERS = {SAMPLE, CHECK, SCORE, SERVE, EXPORT, ADAPTED, PLAN, "view runs/demo"}
OTHERS |= {"list rewards", "list prompts", "list metrics", "doctor"}  # test_doctor.py


def commands():
    """The words after `diffusion-grpo`, of code blocks (comments too) and of `code` in the text."""
    found = [line for _, block in BLOCKS for line in re.findall(f"({COMMAND})$", block, re.M)]
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    found += re.findall(f"`({COMMAND})`", text)
    words = [line.partition("diffusion-grpo ")[2] for line in found]
    return [re.sub(r"\s+#.*", "", line).strip() for line in words]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("readme") / "pipeline", **TWO_LEVELS)


@pytest.fixture
def folder(pipeline, tmp_path, monkeypatch):
    """The folder that a reader of the README is in."""
    for place in ("path/to/checkpoint", "runs/demo/final"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).symlink_to(pipeline)
    (tmp_path / "my_prompts.txt").write_text("a red circle\na blue square\n")
    for _, block in BLOCKS:
        name = re.match(r"# (\w+\.(?:py|yaml))\b", block)
        if name:
            (tmp_path / name[1]).write_text(block)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_the_readme_is_run_here():
    assert sorted(commands()) == sorted([*TRAIN, *LOOK, *OTHERS])


# Each trains; one by default.
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=[pytest.mark.slow] * (not line.startswith("train mine.yaml")))
        for line in TRAIN
    ],
)
def test_training_lines_run(folder, line, capsys):
    # JAX as a user has it: its own bfloat16 attention has no gradient under strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        assert main([*shlex.split(line), *TRAIN[line]]) == 0
    (directory,) = re.findall(r"run directory: (.*)", capsys.readouterr().out)
    assert len(read_metrics(folder / directory)) == 1
    assert (folder / directory / "final" / "model_index.json").is_file()


def test_sampling_line_runs(folder, capsys):
    assert main([*shlex.split(SAMPLE), "--num-images", "2", "--num-steps", "2"]) == 0
    assert Image.open(folder / "grid.png").text["prompt"] == "a red circle"


def test_an_adapter_is_exported_and_drawn_with(folder, pipeline):
    run = record(folder, "mine")
    shutil.copytree(pipeline, run / "final")
    unet = StableDiffusion.from_pretrained(pipeline).unet
    attach_lora(unet, ("to_q",), rank=2, alpha=2.0, rngs=nnx.Rngs(0))
    write_lora({"unet": lora_factors(unet)}, run / "final" / "lora" / FILE)
    assert main(shlex.split(EXPORT)) == 0
    assert (folder / "my-lora" / FILE).is_file() and (folder / "my-lora" / "README.md").is_file()
    assert main([*shlex.split(ADAPTED), *FEW, "--num-images", "1"]) == 0
    assert Image.open(folder / "grid.png").text["lora"] == "my-lora=0.8"


def test_reward_is_checked_and_scores_a_folder(folder):
    (folder / "pictures").mkdir()
    for name, color in (("a.png", "red"), ("b.png", "gray")):
        Image.new("RGB", (16, 16), color).save(folder / "pictures" / name)
    assert main(shlex.split(CHECK)) == 0
    assert main(shlex.split(SCORE)) == 0
    head, *rows = (folder / "scores.csv").read_text().splitlines()
    assert head == "image,prompt,contrast,sharpness,total" and len(rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize("device, card", [("h100", "an H100"), ("rtx4090", "a 4090")])
def test_memory_and_time_of_the_preset_are_those_of_the_table(device, card, capsys):
    assert main([*shlex.split(PLAN)[:-1], device]) == 0
    told = capsys.readouterr().out
    memory = re.search(r"^peak of each device +([\d.]+) GiB", told, re.M)
    seconds = re.search(r"^iteration +([\d.]+) s", told, re.M)
    assert memory and f"{float(memory[1]):.1f} GiB of {card}'s" in README
    column = {"rtx4090": 4, "h100": 7}[device]
    (row,) = re.findall(r"^\| `sd15` \|.*", README, re.M)
    minutes = row.split("|")[column].strip()
    decimals = len(minutes.partition(".")[2])
    assert seconds and f"{float(seconds[1]) / 60:.{decimals}f}" == minutes


def test_reward_is_served(folder):
    words = [*shlex.split(SERVE), "--port", "0"]
    command = [sys.executable, "-m", "diffusion_grpo", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert "serving reward contrast at http://127.0.0.1:" in server.stdout.readline()
        server.terminate()


def record(folder, name):
    """Make a run of what is there: pictures and numbers without training."""
    record_run(folder / "recorded" / name, iterations=2, evaluate_every=1, heldout=4)
    run = folder / "runs" / name
    shutil.copytree(folder / "recorded" / name, run, dirs_exist_ok=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("shapes-diffusion", "path/to/checkpoint"))
    return run


@pytest.mark.parametrize("line", LOOK)
def test_lines_that_look_at_runs_run(folder, line, capsys):
    for name in ("demo", "mine"):
        record(folder, name)
    assert main([*shlex.split(line), *LOOK[line]]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written and all((folder / path).is_file() for path in written)
    assert {word for word in shlex.split(line) if "." in word} <= {*written, "lapse.webp"}


def test_viewing_line_serves_the_page(folder):
    run = record(folder, "demo")
    with make_server([str(run)]) as server:
        assert server.server_address[0] == "127.0.0.1"


def test_what_comes_with_the_project_is_listed(capsys):
    for kind, names in {
        "rewards": {"clip", "jpeg_size"},
        "prompts": {"animals", "counting"},
        "metrics": {"kl", "reward/mean"},
    }.items():
        assert main(["list", kind]) == 0
        assert names <= set(capsys.readouterr().out.split())


def test_make_targets_of_the_documents_exist_and_train_the_demo(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    named = set(re.findall(r"^make (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    assert {"demo"} <= named <= targets
    assert set(re.findall(r'@echo "make (\w+)', makefile)) <= targets
    (recipe,) = re.findall(r"\$\(BIN\)/diffusion-grpo (train .*) \$\(ARGS\)", makefile)
    command, preset, *flags = shlex.split(recipe.replace("$$output", str(tmp_path)))
    assert (command, load_config(preset, flags).run.output) == ("train", str(tmp_path))


def test_extras_of_the_readme_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(re.findall(r"'\.\[(\w+)\]'", README))
    assert extras == {"cuda", "tpu", "serve", "tensorboard"}
    assert extras <= set(project["optional-dependencies"])
