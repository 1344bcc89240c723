"""What the embedded models are to be: measured on held-out scenes, as their cards say."""

import pytest

from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.shapes.measure import measure_autoencoder, measure_clip, measure_pipeline
from diffusion_grpo.shapes.scenes import TASKS


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.from_pretrained("shapes-diffusion")


def test_clip_tells_the_true_caption_from_hard_ones():
    found = measure_clip("shapes-clip", 64, seed=11)
    assert found["mean"] >= 0.95
    assert min(found[task] for task in TASKS) >= 0.9


def test_the_autoencoder_keeps_what_a_caption_says(model):
    found = measure_autoencoder(model, 256, seed=12)
    assert found["rendered"] >= 0.99 and found["round_trip"] >= 0.97


def test_the_base_draws_half_of_the_prompts_right(model):
    """So that there is something to improve, and something to improve on."""
    found, images, _ = measure_pipeline(model, 120, 1.0, 20, seed=0)
    assert images.shape == (120, 64, 64, 3)
    assert 0.35 <= found["all"] <= 0.65
