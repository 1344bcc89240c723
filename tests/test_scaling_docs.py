"""The launch files of `docs/scaling.md` are well-formed, and call what there is."""

import re
import subprocess
from pathlib import Path

import yaml

from diffusion_grpo.config import load_config

TEXT = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|yaml)\n(.*?)```", TEXT, re.DOTALL)


def test_launch_files_are_well_formed():
    assert [kind for kind, _ in BLOCKS] == ["bash", "yaml"]
    for kind, text in BLOCKS:
        script = text
        if kind == "yaml":
            job = yaml.safe_load(text)
            assert job["kind"] == "Job"
            (container,) = job["spec"]["template"]["spec"]["containers"]
            script = container["args"][0]
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


def test_launch_files_start_runs_that_there_are():
    for _, text in BLOCKS:
        for line in re.findall(r"diffusion-grpo train (?!--resume)(.*?)(?: &|;)", text):
            preset, *flags = line.replace('"', "").split()
            assert load_config(preset, flags).run.save_every == 5
