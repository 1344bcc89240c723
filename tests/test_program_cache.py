"""A process compiles a program once, however often it is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from flax import nnx
from test_plan import TINY
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.lora import LoRAParam, attach_lora
from diffusion_grpo.models.kernels import VARIABLE, attend, planned_for
from diffusion_grpo.models.unet import UNet2DConditionModel
from diffusion_grpo.pipeline import TrainablePolicy, generate, make_sampler
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.program_cache import network_jit, shared_programs
from diffusion_grpo.schedule import SchedulerConfig, make_schedule


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


def test_options_for_a_gpu_are_xlas_and_change_no_number(monkeypatch):
    x = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    there = network_jit(lambda x: x @ x)
    monkeypatch.undo()
    # An option that XLA does not know, or a value that it does not take, is an error here too.
    np.testing.assert_allclose(there(x), x @ x, rtol=1e-5)
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x @ x, compiler_options={"xla_gpu_dot_merger_threshold": 1})(x)


@pytest.mark.parametrize("trainable", [LoRAParam, nnx.Param])
def test_parameters_are_cast_once_and_numbers_are_those_of_casts_in_the_layers(trainable):
    rngs = nnx.Rngs(0)
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
    unet = UNet2DConditionModel(TINY, rngs=rngs, **dtypes)
    if trainable is LoRAParam:
        attach_lora(unet, ["to_q", "conv1"], rank=2, alpha=2.0, rngs=rngs)
    policy = TrainablePolicy(unet, 1.0, trainable)
    keys = iter(jax.random.split(jax.random.key(1), 1000))
    moved = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(next(keys), p.shape), policy.trained
    )
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 4))
    text = jax.random.normal(jax.random.key(3), (2, 5, 16), jnp.bfloat16)
    times = jnp.full(2, 7, jnp.int32)

    def in_layers(trained):
        network = nnx.merge(policy.structure.graphdef, trained, policy.frozen)
        return network(x, times, encoder_hidden_states=text)

    def once(trained):
        states = {"encoder_hidden_states": text}
        negative = {"encoder_hidden_states": text[:1]}
        return policy.denoiser(trained, policy.frozen)(x, jnp.int32(7), (states, negative))

    def squares(denoise):
        return jax.jit(jax.grad(lambda t: jnp.square(denoise(t).astype(jnp.float32)).sum()))

    with jax.numpy_dtype_promotion("standard"):  # JAX's attention in bfloat16 promotes, backward
        expected, found = squares(in_layers)(moved), squares(once)(moved)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_a_sampler_multiplies_with_is_cast_before_its_steps():
    unet = UNet2DConditionModel(TINY, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    policy = TrainablePolicy(unet, 1.0)
    schedule = make_schedule(SchedulerConfig(), 3, eta=0.0)
    noise = jnp.zeros((2, 8, 8, 4))
    states = {"encoder_hidden_states": jnp.zeros((2, 5, 16), jnp.bfloat16)}
    negative = {"encoder_hidden_states": jnp.zeros((1, 5, 16), jnp.bfloat16)}
    keys = jax.random.split(jax.random.key(0), 2)
    draw = make_sampler(policy.structure)
    traced = draw.trace(policy.trained, policy.frozen, schedule, noise, keys, (states, negative))
    (scan,) = [e for e in _equations(traced.jaxpr.jaxpr) if e.primitive.name == "scan"]
    kernels = [leaf for leaf in jax.tree.leaves(policy.trained) if leaf.ndim == 4]
    inside = [v.aval for v in scan.invars if v.aval.shape in {k.shape for k in kernels}]
    assert len(inside) >= len(kernels) > 0
    assert {aval.dtype for aval in inside} == {jnp.dtype(jnp.bfloat16)}


def _equations(jaxpr):
    """All equations of a program but those within loops."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name in ("jit", "pjit", "closed_call"):
            yield from _equations(equation.params["jaxpr"].jaxpr)
