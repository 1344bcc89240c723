"""The guides speak of what there is: options, commands, numbers, warnings and files."""

import re
from pathlib import Path

import pytest

from diffusion_grpo import metrics
from diffusion_grpo.config import PRESETS, load_config

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in GUIDES}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name]):
        assert (ROOT / "docs" / "guides" / target).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_runs_are_ones_that_there_are(name):
    for line in re.findall(r"^diffusion-grpo train (.*)$", TEXTS[name], re.MULTILINE):
        preset, *flags = line.split()
        load_config(preset, flags)


@pytest.mark.parametrize("name", TEXTS)
def test_options_are_fields(name):
    sections = vars(PRESETS["demo"])
    named = re.findall(
        rf"\b({'|'.join(sections)})\.([a-z_0-9]+(?:-[a-z0-9]+)*)\b(?!\.)", TEXTS[name]
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
    assert len(quoted) == 9
    for text in quoted:
        assert text in said, text
