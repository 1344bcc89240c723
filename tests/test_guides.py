"""The guides speak of what there is: options, commands, numbers, warnings and files."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo import metrics
from diffusion_grpo.cli import main
from diffusion_grpo.config import PRESETS, load_config
from diffusion_grpo.lora import attach_lora, lora_factors
from diffusion_grpo.lora_files import FILE, write_lora
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.reward_loading import load_reward

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in GUIDES}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name]):
        assert (ROOT / "docs" / "guides" / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_runs_are_ones_that_there_are(name):
    for line in re.findall(r"^diffusion-grpo (?:train|plan) (.*)$", TEXTS[name], re.MULTILINE):
        preset, *flags = shlex.split(line, comments=True)
        if "--device" in flags:  # of plan, beside the run's
            place = flags.index("--device")
            del flags[place : place + 2]
        load_config(preset, flags)


def commands(name, word):
    return re.findall(rf"^diffusion-grpo {word} (.*)$", TEXTS[name], re.MULTILINE)


def test_rewards_of_the_guide_keep_the_contract(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(# (\w+\.py)\n.*?)```", TEXTS["rewards.md"], re.DOTALL)
    assert len(blocks) == 3
    for code, file in blocks:
        Path(file).write_text(code)
        assert main(["check-reward", file]) == 0
        assert "the contract is kept" in capsys.readouterr().out


def test_the_reward_in_pytorch_scores_as_its_network_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n([^`]*import torch[^`]*)```", TEXTS["rewards.md"])
    Path("torch_reward.py").write_text(code)
    (served,) = commands("rewards.md", "serve-reward")
    file, option, value, *_ = shlex.split(served, comments=True)
    assert (file, option) == ("torch_reward.py", "--options")
    linear = torch.nn.Linear(3 * 8 * 8, 1)
    torch.save({f"2.{name}": value for name, value in linear.state_dict().items()}, "weights.pt")
    assert value == "torch_reward.weights=weights.pt"
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    reward = load_reward(file, {"weights": "weights.pt"})
    found = reward.function(images, ["a"] * 5, [{}] * 5)
    pixels = images.transpose(0, 3, 1, 2).reshape(5, -1) / 255.0
    weight, bias = (part.detach().numpy().astype(np.float64) for part in linear.parameters())
    np.testing.assert_allclose(found, pixels @ weight[0] + bias, rtol=1e-5)


def test_a_group_is_drawn_and_scored_as_the_guide_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a red circle\na blue square\n")
    code = re.search(r"```python\n(# warmth\.py\n.*?)```", TEXTS["rewards.md"], re.DOTALL)
    assert code
    Path("warmth.py").write_text(code[1])
    for word, few in (("sample", ["--num-steps", "2", "--quiet"]), ("score", [])):
        (line,) = commands("rewards.md", word)
        assert main([word, *shlex.split(line.replace("shapes_heldout", "two.txt")), *few]) == 0
    assert "within a prompt: std" in capsys.readouterr().out
    assert len(Path("scores.csv").read_text().splitlines()) == 17


def test_an_adapter_is_made_part_of_a_checkpoint_as_the_guide_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "my-checkpoint", **TWO_LEVELS)
    unet = StableDiffusion.from_pretrained("my-checkpoint").unet
    attach_lora(unet, ("to_q",), rank=2, alpha=6.0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    factors = {
        path: f._replace(b=rng.normal(size=f.b.shape)) for path, f in lora_factors(unet).items()
    }
    write_lora({"unet": factors}, Path("my-lora") / FILE)
    (code,) = re.findall(r"```python\n([^`]*fuse_lora[^`]*)```", TEXTS["checkpoints.md"])
    exec(code, {})
    StableDiffusion.from_pretrained("my-checkpoint-in-style")  # strictly: nothing is left over
    before, after = (
        load_file(f"{name}/unet/diffusion_pytorch_model.safetensors")
        for name in ("my-checkpoint", "my-checkpoint-in-style")
    )
    assert before.keys() == after.keys() and factors
    for name in before:
        change = 0.0
        if name.removesuffix(".weight") in factors:
            a, b, scale = factors[name.removesuffix(".weight")]
            change = scale * (np.asarray(a, np.float64) @ b).T
        np.testing.assert_allclose(after[name], before[name] + change, atol=1e-5)


@pytest.mark.slow
def test_sdxl_fits_and_takes_as_long_as_the_guide_says(capsys):
    (line,) = (
        line for line in commands("checkpoints.md", "train") if "stable-diffusion-xl" in line
    )
    assert main(["plan", *shlex.split(line), "--device", "rtx4090"]) == 0
    told = capsys.readouterr().out
    assert "it does not fit" not in told
    seconds = re.search(r"^iteration +(\S+) s", told, re.MULTILINE)
    kept = re.search(r"^trajectories +(\S+) GiB", told, re.MULTILINE)
    assert seconds and kept
    assert f"and {float(seconds[1]) / 3600:.0f} hours with SDXL" in TEXTS["checkpoints.md"]
    assert f"{float(kept[1]) * 2**30 / 256 / 1e6:.0f} MB with SDXL" in TEXTS["checkpoints.md"]


@pytest.mark.parametrize("word", ["sample", "export"])
def test_options_of_the_checkpoint_guide_are_ones_that_there_are(word, capsys):
    with pytest.raises(SystemExit):
        main([word, "--help"])
    known = capsys.readouterr().out
    lines = commands("checkpoints.md", word)
    assert lines
    for flag in re.findall(r"--[\w-]+", " ".join(lines)):
        assert flag in known


@pytest.mark.parametrize("name", TEXTS)
def test_options_are_fields(name):
    sections = vars(PRESETS["demo"])
    named = re.findall(
        rf"\b({'|'.join(sections)})\.([a-z_0-9]+(?:-[a-z0-9]+)*)\b(?!\.)",
        TEXTS[name].replace("model.safetensors", ""),
    )
    assert named
    for section, field in named:
        assert hasattr(sections[section], field.replace("-", "_")), f"{section}.{field}"


def test_numbers_to_watch_are_metrics():
    table = TEXTS["hyperparameters.md"].partition("## What to watch")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*`)", metrics.__doc__ or "", re.MULTILINE)
    known = {name for cell in cells for name in re.findall("`([^`]+)`", cell)}
    named = re.findall(r"`([a-z_]+(?:/[A-Za-z_]+)*)`", table)
    assert len(named) > 10
    for name in named:
        assert name.replace("NAME", "<name>") in known, name


def test_warnings_are_said_somewhere():
    said = " ".join(
        re.sub(r'"\s*\n\s*f?"', "", (ROOT / "diffusion_grpo" / module).read_text(encoding="utf-8"))
        for module in ("report_warnings.py", "learning.py")
    )
    quoted = re.findall(r'\*\*"([^"]+)"\*\*', TEXTS["hyperparameters.md"])
    assert len(quoted) == 10
    for text in quoted:
        assert text in said, text
