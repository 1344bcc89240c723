"""`diffusion-grpo doctor`: what it finds, and that it says so of what is broken."""

import http.server
import os
import subprocess
import sys
import threading
from importlib import metadata

import pytest
from huggingface_hub import constants

from diffusion_grpo.cli import main
from diffusion_grpo.commands import doctor


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_machine_that_passes_these_tests_is_well(offline, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor", "--output", str(tmp_path / "runs" / "new")]) == 0
    said = capsys.readouterr().out
    assert f"jax {metadata.version('jax')}" in said
    assert "shapes-clip, shapes-diffusion" in said
    assert not [line for line in said.splitlines() if line.startswith("!")]
    assert "hf_secret" not in said
    assert not (tmp_path / "runs").exists()


def test_an_output_that_cannot_be_written_is_wrong(offline, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["doctor", "--output", str(tmp_path / "file" / "runs")]) == 1
    said = capsys.readouterr()
    line = next(line for line in said.out.splitlines() if line.startswith("! output"))
    assert line.endswith("file is a file")
    assert "1 thing is wrong" in said.err


def test_jax_without_its_device_is_wrong(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "diffusion_grpo", "doctor", "--timeout", "0.1"],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "! devices      JAX does not run: " in done.stdout
    assert "fonts" in done.stdout  # the rest is looked at all the same


def test_packages_that_are_missing_or_old_are_named():
    def version(name):
        if name == "optax":
            raise metadata.PackageNotFoundError(name)
        return {"flax": "0.11.0"}.get(name, "99")

    said = [str(f) for f in doctor.packages(version) if f.status == "wrong"]
    assert len(said) == 2
    assert any("flax>=0.12.8 is asked for, 0.11.0 is here" in line for line in said)
    assert any("optax>=0.2.8 is not installed" in line for line in said)
    assert any("pip install 'flax>=0.12.8'" in line for line in said)
    assert any("pip install 'optax>=0.2.8'" in line for line in said)


def test_extras_are_not_asked_for():
    asked = " ".join(str(finding) for finding in doctor.packages())
    assert "torch" not in asked and "starlette" not in asked


@pytest.mark.parametrize("answers", [True, False])
def test_the_hub_answers_or_not(monkeypatch, answers):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    if answers:
        threading.Thread(target=server.handle_request).start()
    else:
        server.server_close()
    finding = doctor.hub(timeout=5)
    server.server_close()
    assert finding.status == ("ok" if answers else "note")
    assert finding.found.startswith("answers" if answers else "no answer")


def test_the_cache_is_counted_or_its_trouble_said(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "program").write_bytes(bytes(2**20 * 103))  # 0.1 GiB
    assert doctor.compilation_cache().found == f"{tmp_path}: 1 files, 0.1 GiB"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "program"))
    assert doctor.compilation_cache().status == "note"
    assert doctor.compilation_cache().found.endswith("program is a file")


def test_pillow_without_freetype_is_wrong(monkeypatch):
    from PIL import features

    monkeypatch.setattr(features, "check", lambda name: False)
    assert doctor.fonts().status == "wrong"
