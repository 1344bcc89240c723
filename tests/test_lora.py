import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from flax import nnx
from torch_checkpoints import make_unet

from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora import (
    Factors,
    LoRAParam,
    attach_lora,
    insert_lora,
    lora_factors,
    lora_names,
    merge_lora,
    remove_lora,
    unmerge_lora,
    weight_lora,
)
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.pretrained import module_tensors

TARGETS = ("to_q", "to_k", "to_v", r"to_out\.0")
CONVOLUTIONS = (r"resnets\.\d+\.conv1", r"downsamplers\.0\.conv", "proj_in")


class Small(nnx.Module):
    """A linear layer, and a convolution that halves."""

    def __init__(self, dtype=jnp.float32):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(6, 5, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.convs = nnx.List(
            [nnx.Conv(3, 4, (3, 3), strides=2, padding=((1, 1), (1, 1)), dtype=dtype, rngs=rngs)]
        )


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _float64(*arrays):
    return (np.asarray(a, np.float64) for a in arrays)


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
    module = Small()
    factors = Factors(_random(6, 3), _random(3, 5), 6.0 / 3)
    insert_lora(module, {"linear": factors})
    x = _random(4, 6, seed=1)
    w, b, la, lb = _float64(module.linear.kernel[...], module.linear.bias[...], *factors[:2])
    expected = x @ w + b + 2.0 * (x @ la) @ lb
    np.testing.assert_allclose(module.linear(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_adapted_convolution_equals_torch_with_the_sum_of_kernels():
    module = Small()
    factors = Factors(_random(3, 3, 3, 2), _random(1, 1, 2, 4), 0.5)
    insert_lora(module, {"convs.0": factors})
    x = _random(2, 8, 6, 3, seed=1)
    # B after A is one kernel: Σ_r A[h, w, i, r] B[r, o]
    kernel, bias, a, b = _float64(
        module.convs[0].kernel[...], module.convs[0].bias[...], *factors[:2]
    )
    kernel = kernel + 0.5 * np.einsum("hwir,ro->hwio", a, b[0, 0])
    expected = torch.nn.functional.conv2d(
        torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2),
        torch.tensor(kernel).permute(3, 2, 0, 1),
        torch.tensor(bias),
        stride=2,
        padding=1,
    ).permute(0, 2, 3, 1)
    np.testing.assert_allclose(module.convs[0](jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)
    merge_lora(module)
    np.testing.assert_allclose(module.convs[0].kernel[...], kernel, rtol=1e-5, atol=1e-6)


def test_adapter_of_a_bfloat16_layer_is_float32_and_the_result_bfloat16():
    module = Small(jnp.bfloat16)
    attach_lora(module, ["linear"], rank=2, alpha=1.0, rngs=nnx.Rngs(0))
    adapter = module.linear.adapters["default"]
    assert adapter.lora_a[...].dtype == jnp.float32
    assert module.linear(jnp.ones((1, 6), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_new_adapter_is_drawn_with_a_variance_of_one_over_the_rank_squared():
    module = nnx.Sequential(nnx.Linear(2000, 3, rngs=nnx.Rngs(0)))
    (path,) = attach_lora(module, [r"0"], rank=8, alpha=2.0, rngs=nnx.Rngs(0))
    a, b, scale = lora_factors(module)[path]
    assert (a.shape, b.shape, scale) == ((2000, 8), (8, 3), 0.25)
    draws = np.asarray(a, np.float64) * 8
    assert scipy.stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    assert not b.any()


def test_several_adapters_add_up_with_their_weights():
    module = Small()
    first, second = (
        Factors(_random(6, 2, seed=i), _random(2, 5, seed=i + 9), scale)
        for i, scale in ((1, 3.0), (2, 1.0))
    )
    insert_lora(module, {"linear": first}, name="style")
    insert_lora(module, {"linear": second}, name="subject")
    assert lora_names(module) == ["style", "subject"]
    weight_lora(module, {"style": 0.25})
    x = _random(3, 6)
    w, b = _float64(module.linear.kernel[...], module.linear.bias[...])
    expected = x @ w + b + 0.75 * (x @ first.a) @ first.b + (x @ second.a) @ second.b
    np.testing.assert_allclose(module.linear(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    remove_lora(module, ["style"])
    expected = x @ w + b + (x @ second.a) @ second.b
    np.testing.assert_allclose(module.linear(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)
    assert lora_names(module) == ["subject"]


def test_merge_and_unmerge_come_back_but_for_rounding():
    module = Small()
    attach_lora(module, ["linear", r"convs\.0"], rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    for adapter in (module.linear.adapters["default"], module.convs[0].adapters["default"]):
        adapter.lora_b.set_value(jnp.asarray(_random(*adapter.lora_b.shape)))
    kernel, factors = module.linear.kernel[...], lora_factors(module)
    merged = merge_lora(module)
    assert type(module.linear) is nnx.Linear and type(module.convs[0]) is nnx.Conv
    assert float(jnp.abs(module.linear.kernel[...] - kernel).max()) > 0.1
    unmerge_lora(module, merged)
    np.testing.assert_allclose(module.linear.kernel[...], kernel, atol=1e-6)
    again = lora_factors(module)
    assert again.keys() == factors.keys() == {"linear", "convs.0"}
    assert all((again[k].b == factors[k].b).all() and again[k].scale == 2.0 for k in factors)


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
    attach_lora(unet, (*TARGETS, *CONVOLUTIONS), rank=4, alpha=8.0, rngs=nnx.Rngs(1))
    base = _out(unet)
    _fill(unet)
    adapted = _out(unet)
    assert float(jnp.abs(adapted - base).max()) > 1e-2
    merge_lora(unet)
    assert not lora_names(unet) and not jax.tree.leaves(nnx.state(unet, LoRAParam))
    merged = _out(unet)
    np.testing.assert_allclose(merged, adapted, atol=1e-4 * float(jnp.abs(adapted).max()))


def test_pattern_that_matches_nothing_is_an_error(unet):
    with pytest.raises(UsageError, match="'to_qq' matches no linear.*did you mean 'to_q'"):
        attach_lora(unet, ("to_qq",), rank=4, alpha=4.0, rngs=nnx.Rngs(1))


def test_a_pattern_is_of_whole_names_at_the_end_of_a_path():
    names = ("query", "subquery", "query_norm", "query2")
    layers = {name: nnx.Linear(2, 2, rngs=nnx.Rngs(0)) for name in names}
    module = nnx.Dict(first=nnx.Dict(layers), query=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    adapted = attach_lora(module, ["query"], rank=1, alpha=1.0, rngs=nnx.Rngs(0))
    assert sorted(adapted) == ["first.query", "query"]


def test_norms_cannot_be_adapted(unet):
    with pytest.raises(UsageError, match="'norm1' matches no linear layer or convolution"):
        attach_lora(unet, ("norm1",), rank=4, alpha=4.0, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("path", "factors", "named"),
    [
        ("lineer", Factors(_random(6, 2), _random(2, 5), 1.0), "did you mean 'linear'"),
        ("linear", Factors(_random(6, 2), _random(2, 4), 1.0), r"expects \(6, 2\) and \(2, 5\)"),
        ("convs.0", Factors(_random(3, 2), _random(2, 4), 1.0), r"expects \(3, 3, 3, 2\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(path, factors, named):
    with pytest.raises(UsageError, match=named):
        insert_lora(Small(), {path: factors})


def test_names_must_be_new_to_attach_and_known_to_remove():
    module = Small()
    attach_lora(module, ["linear"], rank=1, alpha=1.0, rngs=nnx.Rngs(0), name="style")
    with pytest.raises(UsageError, match="an adapter named 'style' already"):
        attach_lora(module, ["linear"], rank=1, alpha=1.0, rngs=nnx.Rngs(0), name="style")
    with pytest.raises(UsageError, match="no adapter 'stile' .did you mean 'style'"):
        remove_lora(module, ["stile"])
