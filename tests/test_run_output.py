"""What a run leaves behind while it goes."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffusion_grpo import run_output
from diffusion_grpo.config import Config, RolloutConfig, RunConfig
from diffusion_grpo.grids import image_grid
from diffusion_grpo.metrics import MetricsLog, read_metrics
from diffusion_grpo.run_output import RunOutput


@pytest.fixture
def grid(tmp_path):
    """Write the grid of an iteration's images and read it back."""
    (tmp_path / "samples").mkdir()

    def written(images, prompts):
        config = Config(
            rollout=RolloutConfig(images_per_prompt=len(images) // len(prompts)),
            run=RunConfig(output=str(tmp_path), report=False, tensorboard="off"),
        )
        log = MetricsLog(tmp_path)
        with RunOutput(config, tmp_path, log, start=0, quiet=True, verbose=False) as output:
            output.samples(3, jnp.asarray(images), prompts, 0.5)
        return np.asarray(Image.open(tmp_path / "samples" / "iteration_00003.png"))

    return written


def test_a_grid_of_many_large_images_is_reduced(grid, monkeypatch):
    monkeypatch.setattr(run_output, "GRID_SIDE", 1000)
    shades = np.arange(16, dtype=np.uint8) * 10 + 20
    images = np.broadcast_to(shades[:, None, None, None], (16, 512, 512, 3)).copy()
    page = grid(images, ["a", "b", "c", "d"])
    assert 700 < min(page.shape[:2]) and max(page.shape[:2]) < 1100
    # each image is there, and they are of one size
    areas = {int((page == shade).all(axis=-1).sum()) for shade in shades}
    assert len(areas) == 1 and areas.pop() == (1000 // 4 - 48) ** 2


def test_images_of_a_grid_become_no_smaller_than_in_the_gallery(grid, monkeypatch):
    monkeypatch.setattr(run_output, "GRID_SIDE", 100)
    page = grid(np.full((4, 512, 512, 3), 40, np.uint8), ["a", "b"])
    assert (page == 40).all(axis=-1).sum() == 4 * 64**2


def test_a_grid_that_is_small_enough_stays_as_it_is(grid):
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    expected = image_grid(images, ["a", "b"], columns=2, title="iteration 3: reward 0.5000")
    assert (grid(images, ["a", "b"]) == np.asarray(expected)).all()


def test_trackers_have_no_metric_again_that_an_evaluation_is_added_to(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(4, {"reward/mean": 0.5})
    config = Config(run=RunConfig(output=str(tmp_path), report=False, tensorboard="on"))
    with RunOutput(config, tmp_path, log, start=5, quiet=True, verbose=False) as output:
        metrics = output.unevaluated()
        assert metrics == {"reward/mean": 0.5}
        metrics["eval/reward/mean"] = 0.25
        output.metrics(4, metrics)
    assert read_metrics(tmp_path) == [
        {"iteration": 4, "reward/mean": 0.5, "eval/reward/mean": 0.25}
    ]
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert read.Tags()["scalars"] == ["eval/reward/mean"]
