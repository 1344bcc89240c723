import subprocess
import sys

import pytest

from diffusion_grpo import resources
from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.resources import embedded_checkpoints, resolve_checkpoint, resource_path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder of our own, whose package folder is `package`."""
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    monkeypatch.setattr(resources, "_PACKAGE", package)
    return package.parent


def _checkout(project, kind="assets"):
    (project / "pyproject.toml").touch()
    (project / kind).mkdir()


def test_checkout_is_used_in_place(project):
    _checkout(project)
    assert resource_path("assets", "a", "b.json") == project / "assets" / "a" / "b.json"


@pytest.mark.parametrize("stray_folder", [False, True])
def test_installed_package_uses_the_copy_it_carries(project, stray_folder):
    if stray_folder:  # some other distribution's top-level folder in site-packages
        (project / "assets").mkdir()
    expected = project / "package" / "_resources" / "assets" / "a"
    assert resource_path("assets", "a") == expected


def test_checkpoint_is_a_directory_before_an_embedded_name(project, tmp_path, monkeypatch):
    _checkout(project)
    (project / "assets" / "tiny").mkdir()
    (project / "assets" / "tiny" / "model_index.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("tiny") == project / "assets" / "tiny"
    (tmp_path / "tiny").mkdir()
    found = resolve_checkpoint("tiny")
    assert not isinstance(found, str)
    assert found.resolve() == tmp_path / "tiny"


def test_checkpoint_may_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("owner/model-v1.5") == "owner/model-v1.5"


@pytest.mark.parametrize("name", ["", "  ", "tyni", "/no/such/dir", "./a/b", "~/no", "..", "a/b/c"])
def test_checkpoint_that_cannot_be_is_refused(project, name, tmp_path, monkeypatch):
    _checkout(project)
    monkeypatch.chdir(tmp_path)
    if name == "..":
        monkeypatch.chdir("/")
        assert not isinstance(resolve_checkpoint(name), str)  # an existing directory
        return
    with pytest.raises(UsageError, match=r"no such directory|is empty"):
        resolve_checkpoint(name)


def test_misspelled_embedded_checkpoint_gets_a_suggestion(project):
    _checkout(project)
    (project / "assets" / "tiny").mkdir()
    (project / "assets" / "tiny" / "config.json").touch()
    (project / "assets" / "figures").mkdir()
    assert embedded_checkpoints() == ["tiny"]
    with pytest.raises(UsageError, match=r"'tyny'.*did you mean 'tiny'"):
        resolve_checkpoint("tyny")


def test_suggestion_is_the_nearest_name_or_nothing():
    assert suggest("Clp", ["jpeg_size", "clip"]) == " (did you mean 'clip'?)"
    assert suggest("zzz", ["jpeg_size", "clip"]) == ""
    assert suggest("x", []) == ""


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("diffusion_grpo", "jax torch diffusers transformers orbax numpy tyro"),
        ("diffusion_grpo.resources", "jax torch diffusers transformers orbax"),
        ("diffusion_grpo.config", "jax torch diffusers transformers orbax"),
        ("diffusion_grpo.prompts", "jax torch diffusers transformers orbax"),
        ("diffusion_grpo.cli", "jax torch diffusers transformers orbax"),
    ],
)
def test_light_modules_import_nothing_heavy(module, absent):
    code = f"import sys, {module}; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
