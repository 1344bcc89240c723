"""A process compiles a program once, however often it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.models.kernels import VARIABLE, attend, planned_for
from diffusion_grpo.pipeline import generate
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.program_cache import shared_programs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("programs") / "pipeline", **TWO_LEVELS)


def pictures(checkpoint, **options):
    model = StableDiffusion.from_pretrained(checkpoint)
    return generate(model, ["a red circle", "a blue square"], num_steps=2, **options)


def test_what_was_drawn_once_is_drawn_again_without_compiling(checkpoint, monkeypatch):
    jax.clear_caches()
    with compilations() as first:
        once = pictures(checkpoint, seed=1)
    with compilations() as second:
        again, other = pictures(checkpoint, seed=1), pictures(checkpoint, seed=2)
    assert {"encode", "draw", "decode"} <= set(first)
    assert second == []
    np.testing.assert_array_equal(again, once)
    assert (other != once).any()
    with compilations() as third:
        pictures(checkpoint, seed=1, guidance_scale=2.0)
    assert "draw" in third
    assert "decode" not in third
    monkeypatch.setenv(VARIABLE, "heads_first")
    with compilations() as fourth:
        pictures(checkpoint, seed=1)
    assert "draw" in fourth


def test_a_program_traced_for_a_planned_device_is_not_run():
    @jax.jit
    def program(x):
        return attend(x, x, x)

    x = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.bfloat16)
    with planned_for("gpu"):
        planned = str(program.trace(x).jaxpr)
    here = str(program.trace(x).jaxpr)
    assert "fused_attention" in planned
    assert "fused_attention" not in here


def test_a_maker_is_called_once_for_equal_arguments():
    made = []

    @shared_programs
    def make(structure, *, previews=False):
        """Doc."""
        made.append((structure, previews))
        return jax.jit(lambda x: x + structure[0])

    assert make((1, "a")) is make((1, "a"))
    assert make((2, "a")) is not make((1, "a"))
    assert make((1, "a"), previews=True) is not make((1, "a"))
    assert made == [((1, "a"), False), ((2, "a"), False), ((1, "a"), True)]
    assert make.__name__ == "make"
    with pytest.raises(TypeError, match="unhashable"):
        make([1])
