"""The launch files of `docs/launch` are well-formed, and their commands are ones that there are."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from diffusion_grpo.config import load_config
from diffusion_grpo.distributed import split_launch
from diffusion_grpo.mesh import check_divides

FOLDER = Path(__file__).parents[1] / "docs" / "launch"
DEVICES = {"slurm.sh": 16, "jobset.yaml": 16, "tpu_pod.sh": 32}


def scripts(name):
    """Return the shell text of a launch file: itself, what a pod runs, what it sends to hosts."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    if name.endswith(".yaml"):
        (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
        return container["args"]
    sent = re.findall(r"--command '\n(.*?)'", text, re.DOTALL)
    return [text, *sent]


def test_every_launch_file_is_checked():
    assert {path.name for path in FOLDER.iterdir()} == DEVICES.keys()


@pytest.mark.parametrize("name", DEVICES)
def test_launch_files_are_well_formed(name):
    for script in scripts(name):
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.returncode == 0 and not checked.stderr, checked.stderr


@pytest.mark.parametrize("name", DEVICES)
def test_launch_files_start_runs_that_there_are(name):
    *_, script = scripts(name)
    script = script.replace("\\\n", " ")
    shared = "".join(re.findall(r"^\s*set -- (.*)$", script, re.MULTILINE))
    commands = re.findall(r"diffusion-grpo train (.*)$", script, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        variables = {'"$@"': shared, '"$RUN"': "/runs/sd15", '"$JOB_COMPLETION_INDEX"': "1"}
        for variable, value in variables.items():
            command = command.replace(variable, value)
        launch, words = split_launch(shlex.split(command.replace('"$JOB_COMPLETION_INDEX"', "1")))
        assert launch is not None
        if words[0] == "--resume":
            assert words == ["--resume", "/runs/sd15"]
            continue
        config = load_config(words[0], words[1:])
        assert config.run.save_every == 5 and config.run.output == "/runs/sd15"
        check_divides(config, DEVICES[name])


def test_a_pod_goes_to_the_address_that_jobset_gives_the_first(tmp_path):
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text(encoding="utf-8"))
    assert jobset["kind"] == "JobSet"
    name, (job,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    (script,) = scripts("jobset.yaml")
    # https://jobset.sigs.k8s.io: JOBSET-REPLICATEDJOB-INDEX-POD.JOBSET
    assert f"--distributed.coordinator-address {name}-{job['name']}-0-0.{name}:1234" in script
    completions = job["template"]["spec"]["completions"]
    assert f"--distributed.num-processes {completions} " in script.replace("\\\n", " ")
