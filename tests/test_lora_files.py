"""Adapters in files: Diffusers with PEFT loads ours, and theirs and kohya's are read."""

import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DiffusionPipeline
from flax import nnx
from torch_checkpoints import write_family

from diffusion_grpo.lora import Factors, attach_lora, lora_factors
from diffusion_grpo.lora_files import FILE, read_lora, write_lora
from diffusion_grpo.pretrained import StableDiffusion

TARGETS = ("to_q", r"to_out\.0", r"resnets\.\d+\.conv1", r"\w+samplers\.0\.conv", "proj_in")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("lora") / "sdxl", "sdxl")


@pytest.fixture(scope="module")
def model(sdxl):
    return StableDiffusion.from_pretrained(sdxl)


@pytest.fixture(scope="module")
def factors(sdxl):
    unet = StableDiffusion.from_pretrained(sdxl).unet
    attach_lora(unet, TARGETS, rank=3, alpha=6.0, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    return {
        path: Factors(f.a, jnp.asarray(rng.normal(size=f.b.shape), jnp.float32), f.scale)
        for path, f in lora_factors(unet).items()
    }


def _delta(factors):
    """(α/r) B A of a layer, by NumPy, in the layer's layout."""
    a, b = (np.asarray(x, np.float64) for x in factors[:2])
    return factors.scale * np.einsum("...ir,ro->...io", a, b.reshape(b.shape[-2:]))


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(_delta(found[path]), _delta(expected[path]), atol=1e-5)


def test_what_is_written_diffusers_adds_to_the_right_layers(factors, sdxl, tmp_path):
    write_lora({"unet": factors}, tmp_path / FILE)
    pipe = DiffusionPipeline.from_pretrained(sdxl)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(tmp_path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        change = (after[name] - before[name]).numpy()
        path = name.removesuffix(".weight")
        if path in factors:
            delta = _delta(factors[path])
            delta = delta.T if delta.ndim == 2 else delta.transpose(3, 2, 0, 1)
            np.testing.assert_allclose(change, delta, atol=1e-5)
        else:
            assert not change.any(), name


def test_what_is_written_is_read(factors, model, tmp_path):
    write_lora({"unet": factors}, tmp_path / FILE)
    _assert_same(read_lora(tmp_path, model)["unet"], factors)
