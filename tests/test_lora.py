import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from torch_checkpoints import make_unet

from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora import LoRALinear, LoRAParam, attach_lora, merge_lora
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.pretrained import module_tensors

TARGETS = ("to_q", "to_k", "to_v", r"to_out\.0")


@pytest.fixture
def unet():
    return UNet2DConditionModel(UNetConfig.from_dict(dict(make_unet().config)), rngs=nnx.Rngs(0))


def _inputs():
    return (
        jax.random.normal(jax.random.key(0), (2, 8, 8, 4)),
        jnp.array([5, 900]),
        jax.random.normal(jax.random.key(1), (2, 7, 24)),
    )


def _out(unet):
    return jax.jit(lambda unet, *args: unet(*args))(unet, *_inputs())


def _fill(unet):
    """Give B values, so that the adapter does something."""
    for path, leaf in nnx.to_flat_state(nnx.state(unet, LoRAParam)):
        if path[-1] == "lora_b":
            leaf.set_value(0.3 * jax.random.normal(jax.random.key(len(path)), leaf.shape))


def test_adapter_equals_the_formula_in_float64():
    linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    layer = LoRALinear(linear, rank=3, alpha=6.0, rngs=nnx.Rngs(1))
    layer.lora_b.set_value(jax.random.normal(jax.random.key(2), (3, 5)))
    x = np.random.default_rng(0).normal(size=(4, 6))
    w, b, la, lb = (
        np.asarray(p[...], np.float64)
        for p in (layer.kernel, layer.bias, layer.lora_a, layer.lora_b)
    )
    expected = x @ w + b + 6.0 / 3 * (x @ la) @ lb
    np.testing.assert_allclose(layer(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5, atol=1e-6)


def test_new_adapter_changes_nothing_exactly(unet):
    before = _out(unet)
    paths = attach_lora(unet, TARGETS, rank=4, alpha=4.0, rngs=nnx.Rngs(1))
    # 2 down levels + middle + 2 levels up with 2 each = 1 + 1 + 1 + 2 + 2 transformers of 2 × 4
    # projections
    assert len(paths) == 7 * 8
    assert (_out(unet) == before).all()


def test_only_the_adapter_is_trained(unet):
    attach_lora(unet, TARGETS, rank=4, alpha=4.0, rngs=nnx.Rngs(1))
    graphdef, adapter, frozen = nnx.split(unet, LoRAParam, ...)
    assert {path[-1] for path, _ in nnx.to_flat_state(adapter)} == {"lora_a", "lora_b"}
    gradient = jax.jit(
        jax.grad(lambda a: jnp.square(nnx.merge(graphdef, a, frozen)(*_inputs())).sum())
    )(adapter)
    assert all(
        (jnp.abs(g).max() > 0) == (p[-1] == "lora_b") for p, g in nnx.to_flat_state(gradient)
    )


def test_checkpoint_of_an_adapted_model_holds_the_base_weights(unet):
    names = module_tensors(unet).keys()
    attach_lora(unet, TARGETS, rank=4, alpha=4.0, rngs=nnx.Rngs(1))
    assert module_tensors(unet).keys() == names


def test_merged_model_gives_the_same_output_without_adapters(unet):
    attach_lora(unet, TARGETS, rank=4, alpha=8.0, rngs=nnx.Rngs(1))
    base = _out(unet)
    _fill(unet)
    adapted = _out(unet)
    assert float(jnp.abs(adapted - base).max()) > 1e-2
    merge_lora(unet)
    assert not any(isinstance(node, LoRALinear) for _, node in nnx.iter_graph(unet))
    merged = _out(unet)
    np.testing.assert_allclose(merged, adapted, atol=1e-4 * float(jnp.abs(adapted).max()))


def test_pattern_that_matches_nothing_is_an_error(unet):
    with pytest.raises(UsageError, match="'q_proj' matches no linear layer"):
        attach_lora(unet, ("q_proj",), rank=4, alpha=4.0, rngs=nnx.Rngs(1))
