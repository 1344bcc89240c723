"""Pretraining of the embedded models: what a batch holds, and all stages end to end, made small."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file

from diffusion_grpo.errors import UsageError
from diffusion_grpo.pretrained import StableDiffusion, load_clip, load_tokenizer
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.resources import resource_path
from diffusion_grpo.shapes import pretrain
from diffusion_grpo.shapes.measure import true_scenes
from diffusion_grpo.shapes.training_batches import (
    UNetBatches,
    draw_timesteps,
    names_a_plain_pair,
    states_a_place,
    tokenize,
)
from diffusion_grpo.shapes.verify import verify

WEIGHTS = "model.safetensors"


def test_early_timesteps_have_their_share_beside_a_logit_normal() -> None:
    n = 40_000
    plain = np.asarray(draw_timesteps(jax.random.key(0), n, 0.0)) / 1000
    early = np.asarray(draw_timesteps(jax.random.key(0), n, 0.4)) / 1000
    normal = scipy.stats.norm(scale=1.1)
    for edge in (0.2, 0.5, 0.7, 0.9):
        below = normal.cdf(math.log(edge / (1 - edge)))
        assert np.mean(plain < edge) == pytest.approx(below, abs=0.01)
        uniform = max(0.0, (edge - 0.7) / 0.3)
        assert np.mean(early < edge) == pytest.approx(0.6 * below + 0.4 * uniform, abs=0.01)
    assert plain.min() >= 0
    assert early.max() < 1


def test_scenes_with_a_place_and_plain_pairs_have_their_shares() -> None:
    ids = np.arange(1000, dtype=np.int32)[:, None] + 1
    placed = np.arange(0, 1000, 5)
    empty = np.zeros(1, np.int32)
    latents = np.arange(1000, dtype=np.float16)[:, None, None, None]
    paired = np.arange(1, 1000, 5)
    batches = UNetBatches(
        latents, ids, placed, paired, empty, seed=3, batch=20_000, place_share=0.5, pair_share=0.2
    )
    batch = batches(7)
    rows = batch["latents"][:, 0, 0, 0].astype(int)
    # Half of them and a fifth of the rest; a fifth of them and a fifth of the rest.
    assert np.mean(rows % 5 == 0) == pytest.approx(0.5 + 0.2 * 0.3, abs=0.02)
    assert np.mean(rows % 5 == 1) == pytest.approx(0.2 + 0.2 * 0.3, abs=0.02)
    captioned = batch["ids"][:, 0] != 0
    assert np.mean(captioned) == pytest.approx(0.9, abs=0.01)
    np.testing.assert_array_equal(batch["ids"][captioned, 0], rows[captioned] + 1)
    np.testing.assert_array_equal(batches(7)["latents"], batch["latents"])
    assert (batches(8)["latents"] != batch["latents"]).any()


def test_captions_that_state_a_place_or_name_a_plain_pair_are_told_by_their_tokens() -> None:
    tokenizer = load_tokenizer(resource_path("assets", "shapes-clip"))
    prompts = load_prompts("shapes_heldout")
    ids = tokenize(tokenizer, [p.text for p in prompts])
    for told, task in ((states_a_place, "position"), (names_a_plain_pair, "two_object")):
        assert told(tokenizer, ids).tolist() == [p.metadata["task"] == task for p in prompts]
        assert 0 < told(tokenizer, ids).mean() < 1


def test_the_embedded_text_encoder_is_the_text_tower_of_the_embedded_clip() -> None:
    encoder = load_file(resource_path("assets", "shapes-diffusion", "text_encoder", WEIGHTS))
    clip = load_file(resource_path("assets", "shapes-clip", WEIGHTS))
    assert {name for name in clip if name.startswith("text_model.")} == set(encoder)
    for name, value in encoder.items():
        np.testing.assert_array_equal(value, clip[name])


def test_true_scenes_are_what_their_captions_say_and_differ() -> None:
    texts = ["a small red cross", "a square", "a red square"]
    scenes = true_scenes(texts, 3, seed=0)
    assert scenes.shape == (3, 3, 64, 64, 3)
    said = [text for text in texts for _ in range(3)]
    assert verify(scenes.reshape(9, 64, 64, 3), said).passed.all()
    assert len({image.tobytes() for image in scenes.reshape(9, -1)}) == 9
    with pytest.raises(UsageError, match="found 0 of 1 .*'a dog'.*shapes_heldout.txt"):
        true_scenes(["a dog"], 1, seed=0, rounds=1)


def test_shares_that_exceed_a_batch_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shares = ["--unet-place-share", "0.8", "--unet-pair-share", "0.3"]
    monkeypatch.setattr(sys, "argv", ["pretrain", "unet", "--build", str(tmp_path), *shares])
    with pytest.raises(SystemExit):
        pretrain.main()
    assert "0.8 and --unet-pair-share 0.3 are shares of one batch" in capsys.readouterr().err


def _pretrain(build: Path, *args: str) -> str:
    command = [sys.executable, "-m", "diffusion_grpo.shapes.pretrain", *args, "--build", str(build)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_all_stages_from_nothing(tmp_path: Path) -> None:
    clip = ("clip", "--clip-steps", "2", "--clip-batch", "8")
    vae = ("vae", "--vae-crop-steps", "2", "--vae-steps", "2", "--vae-decoder-steps", "2")
    unet = ("unet", "--unet-batch", "4", "--unet-scenes", "256", "--unet-steps")
    _pretrain(tmp_path, *clip)
    _pretrain(tmp_path, *vae)
    assert "step 2/2" in _pretrain(tmp_path, *unet, "2")
    again = _pretrain(tmp_path, *unet, "3")
    assert re.search(r"unet: resumed at step 2\n.*step 3/3", again)
    load_clip(tmp_path / "shapes-clip")
    model = StableDiffusion.from_pretrained(str(tmp_path / "shapes-diffusion"))
    embedded = StableDiffusion.from_pretrained("shapes-diffusion")
    for part in ("unet", "vae", "text_encoder"):
        found = jax.tree.map(lambda x: x.shape, jax.tree.leaves(getattr(model, part)))
        assert found == jax.tree.map(lambda x: x.shape, jax.tree.leaves(getattr(embedded, part)))


@pytest.mark.slow
def test_the_unet_alone_from_the_embedded_parts(tmp_path: Path) -> None:
    assets = resource_path("assets")
    shutil.copytree(assets / "shapes-clip", tmp_path / "shapes-clip")
    shutil.copytree(assets / "shapes-diffusion" / "vae", tmp_path / "vae")
    _pretrain(tmp_path, "unet", "--unet-batch", "4", "--unet-scenes", "256", "--unet-steps", "2")
    made = StableDiffusion.from_pretrained(str(tmp_path / "shapes-diffusion"))
    assert made.vae.config == StableDiffusion.from_pretrained("shapes-diffusion").vae.config
