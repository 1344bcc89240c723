"""Pretraining of the embedded models: what a batch holds, and all stages end to end, made small."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from safetensors.numpy import load_file, save_file

from diffusion_grpo.errors import UsageError
from diffusion_grpo.pretrained import StableDiffusion, load_clip, load_tokenizer
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.resources import resource_path
from diffusion_grpo.shapes import pretrain
from diffusion_grpo.shapes.captions import split_of
from diffusion_grpo.shapes.fit import FitConfig, fit
from diffusion_grpo.shapes.measure import main as measure_main
from diffusion_grpo.shapes.measure import true_scenes
from diffusion_grpo.shapes.training_batches import (
    ClipBatches,
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "unet --unet-place-share 0.8 --unet-pair-share 0.3",
            "0.8 and --unet-pair-share 0.3 are shares of one batch",
        ),
        ("unet --unet-pair-share -0.5", "--unet-pair-share is -0.5; expected a share"),
        ("unet --unet-early-share 2", "--unet-early-share is 2; expected a share"),
        ("unet --unet-scenes 1000", "--unet-scenes is 1000; expected a multiple of 256"),
        ("clip --clip-steps 0", "--clip-steps is 0; expected 1 or more"),
        ("clip --workers -9", "--workers is -9; expected 0 or more"),
        ("clip unet", "the stage unet needs .*vae, which is not there; run the stage vae"),
        ("vae unet", "needs .*shapes-clip, which is not there; run the stage clip first"),
        ("install", "has neither shapes-clip nor shapes-diffusion"),
        ("clap", "unknown stage 'clap'"),
    ],
)
def test_what_no_stage_can_use_is_refused_before_one_is_run(
    words: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain", *words.split(), "--build", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "--num-prompts 0",
        "--num-steps 0",
        "--grid missing/grid.png",
        "--model shapes",
        "--clip shapes-clop",
        "--guidance --grid grid.png",
    ],
)
def test_measure_refuses_what_it_cannot_use(
    words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusion_grpo.shapes.measure.measure_autoencoder", None)
    with pytest.raises(SystemExit, match="2"):
        measure_main(words.split())
    assert words.split()[1] in capsys.readouterr().err


@pytest.mark.parametrize("built", ["shapes-clip", "shapes-diffusion"])
def test_a_text_encoder_of_another_clip_is_not_installed(built: str, tmp_path: Path) -> None:
    """Nor a CLIP beside the pipeline that is there, whose text encoder is of the one before."""
    build, assets = tmp_path / "build", tmp_path / "assets"
    for name in ("shapes-clip", "shapes-diffusion/text_encoder"):
        shutil.copytree(resource_path("assets", name), assets / name)
    shutil.copytree(assets / built, build / built)
    pretrain.install(build, assets)  # the same
    part = {"shapes-clip": "shapes-clip", "shapes-diffusion": "shapes-diffusion/text_encoder"}
    file = build / part[built] / WEIGHTS
    tensors = load_file(file)
    name = "text_model.final_layer_norm.weight"
    save_file(tensors | {name: tensors[name] + np.float16(1)}, file, metadata={"format": "pt"})
    before = (assets / part[built] / WEIGHTS).read_bytes()
    with pytest.raises(UsageError, match="is not the text tower of .*shapes-clip"):
        pretrain.install(build, assets)
    assert (assets / part[built] / WEIGHTS).read_bytes() == before


def test_no_caption_of_clip_s_training_is_held_out() -> None:
    """Nor a false one: what is always false there would be scored as false ever after."""
    tokenizer = load_tokenizer(resource_path("assets", "shapes-clip"))
    batch = ClipBatches(tokenizer, 0, 64, 3)(3)
    for name in ("true_ids", "false_ids"):
        ids = batch[name].reshape(-1, batch[name].shape[-1])
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
        assert {split_of(text) for text in texts} == {"train"}


def _line(directory: Path, batch_fn: Any = None, seed: int = 0, **changed: Any) -> Any:
    """Fit a line to a parabola, one point a step."""
    with jax.numpy_dtype_promotion("standard"):  # as in the command; Optax needs it
        return fit(
            {"w": jnp.zeros(2)},
            lambda p, x, key: (jnp.square(p["w"][0] + p["w"][1] * x - x**2).mean(), {}),
            batch_fn or (lambda step: np.float32(np.sin(step))),
            config=FitConfig(**{"steps": 12, "learning_rate": 0.1, "ema": 0.9} | changed),
            directory=directory / "line",
            key=jax.random.key(seed),
            name="line",
            inputs={"seed": seed},
        )


def test_a_stage_that_was_interrupted_loses_no_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(step: int) -> np.float32:
        if step == 7:
            raise KeyboardInterrupt
        return np.float32(np.sin(step))

    whole = _line(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _line(tmp_path / "broken", interrupted)
    resumed = _line(tmp_path / "broken")
    assert "line: resumed at step 7" in capsys.readouterr().out
    np.testing.assert_array_equal(resumed["w"], whole["w"])


def test_a_stage_of_another_start_seed_or_length_is_not_resumed(tmp_path: Path) -> None:
    _line(tmp_path)
    _line(tmp_path, log_every=3)  # the same
    for changed, name in (({"seed": 1}, "seed"), ({"steps": 24}, "steps")):
        with pytest.raises(UsageError, match=f"line was begun with {name} .*another --build"):
            _line(tmp_path, **changed)
    (tmp_path / "line.json").unlink()
    with pytest.raises(UsageError, match="begun with seed unknown"):
        _line(tmp_path)


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
    assert "unet: resumed at step 2\n" in _pretrain(tmp_path, *unet, "2")
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
