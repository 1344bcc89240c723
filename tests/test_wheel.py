import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTENT = ("rewards", "prompts", "assets")


def _run(*command, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True
    )


def _checked(*command, cwd):
    done = _run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel built from it (so both are complete)."""
    folder = tmp_path_factory.mktemp("dist")
    build = (sys.executable, "-m", "hatchling", "build")
    _checked(*build, "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    _checked(*build, "-t", "wheel", "-d", folder, cwd=source)
    (wheel,) = folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The `bin` folder of a new environment with the wheel, and our own dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    purelib = _checked(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    )
    # pip of this environment installs into the new one, which then sees our dependencies too.
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    _checked(*pip, "--no-deps", "--no-index", distributions[1], cwd=folder)
    dependencies = Path(purelib.strip()) / "dependencies.pth"
    dependencies.write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def _content_of_the_checkout():
    listed = _run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:  # no git, or a source distribution
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    content = {name for name in names if name.startswith(tuple(f"{kind}/" for kind in CONTENT))}
    return {name for name in content if "__pycache__" not in name and (ROOT / name).is_file()}


def test_wheel_carries_the_content_inside_the_package(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    content = _content_of_the_checkout()
    assert {f"{kind}/" for kind in CONTENT} == {name.partition("/")[0] + "/" for name in content}
    missing = {f"diffusion_grpo/_resources/{name}" for name in content} - names
    assert not missing
    assert "diffusion_grpo/py.typed" in names
    page = {path.name for path in (ROOT / "diffusion_grpo" / "report_page").iterdir()}
    assert {f"diffusion_grpo/report_page/{name}" for name in page} <= names and len(page) == 6
    assert {name.partition("/")[0] for name in names} == {
        "diffusion_grpo",
        next(name for name in names if name.endswith("/METADATA")).partition("/")[0],
    }
    assert not [name for name in names if name.endswith((".pyc", ".bin", ".ckpt", ".pkl"))]


def test_source_distribution_carries_tests_and_documents(distributions):
    source, _ = distributions
    files = ["README.md", "LICENSE", "CHANGELOG.md", "Makefile", "tests/conftest.py"]
    files += ["benchmarks/cost_vs_size.py", "benchmarks/cost_vs_size.json"]  # which tests read
    files += [".ci/mkdocs.yml", ".ci/run"]
    for name in files:
        assert (source / name).is_file(), name


def test_installed_command_works_from_an_empty_folder(installed, tmp_path):
    shown = _checked(installed / "diffusion-grpo", "--help", cwd=tmp_path)
    assert "train" in shown and "sample" in shown
    rewards = _checked(installed / "diffusion-grpo", "list", "rewards", cwd=tmp_path)
    assert "clip" in rewards and "jpeg_size" in rewards
    assert list(tmp_path.iterdir()) == []


def test_installed_package_finds_its_own_content(installed, tmp_path):
    code = (
        "from diffusion_grpo.prompts import load_prompts\n"
        "from diffusion_grpo.resources import resolve_checkpoint, resource_path\n"
        "print(resource_path('rewards', 'clip.py'))\n"
        "print(resolve_checkpoint('shapes-diffusion') / 'model_index.json')\n"
        "assert load_prompts('shapes')\n"
    )
    paths = _checked(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(paths) == 2
    for path in paths:
        assert Path(path).is_file()
        assert Path(path).is_relative_to(installed.parent)


def test_installed_command_refuses_nonsense_with_code_2(installed, tmp_path):
    done = _run(installed / "diffusion-grpo", "train", "dmo", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'demo'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_user_trains_and_looks_at_the_run(installed, tmp_path):
    program = installed / "diffusion-grpo"
    train = [
        *("train", "demo", "--output", "run", "--iterations", "1", "--quiet"),
        *("--rollout.prompts-per-iteration", "1", "--rollout.images-per-prompt", "2"),
        *("--grpo.best-and-worst", "None"),
        *("--rollout.num-steps", "4", "--rollout.window-size", "2", "--rollout.microbatch", "2"),
        *("--grpo.microbatch", "2", "--grpo.updates-per-rollout", "1"),
        *("--eval.num-prompts", "2", "--eval.num-steps", "2"),
    ]
    _checked(program, *train, cwd=tmp_path)
    few = ("--num-steps", "2", "--num-prompts", "2")
    for words, files in [
        (("sample", "--prompts", "counting", *few, "--sampler", "dpm++"), ("grid.png",)),
        (("sample", "--prompt", "a star", *few, "--animate", "a.webp"), ("grid.png", "a.webp")),
        (("compare", "run", *few, "--reward", "clip"), ("compare.png",)),
        (("compare", "run", "--strip", "strip.png"), ("strip.png",)),
        (("evaluate", "run", "--base", "run@base", *few), ("evaluation.json", "evaluation.md")),
        (("report", "run", "--output", "page.html"), ("page.html",)),
    ]:
        shown = _checked(program, *words, cwd=tmp_path)
        assert shown.split() == list(files)
        assert all(
            (tmp_path / file).stat().st_size > 1000 or file.endswith(".md") for file in files
        )
    page = (tmp_path / "page.html").read_text()
    assert "uPlot" in page and (tmp_path / "run" / "report.html").is_file()
