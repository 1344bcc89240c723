"""The choice of an attention implementation, and that ours computes attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from virtual_run import said_on

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.kernels import VARIABLE, attend, attention_implementation

BF16, FP32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("backend", "dtype", "queries", "keys", "head_dim", "expected"),
    [
        # Stable Diffusion 1.5 at 512 x 512: head widths 40, 80 and 160, and 77 text tokens
        ("gpu", BF16, 4096, 4096, 40, "cudnn"),
        ("gpu", BF16, 1024, 1024, 80, "cudnn"),
        ("gpu", BF16, 256, 256, 160, "xla"),
        ("gpu", BF16, 4096, 77, 40, "xla"),
        ("gpu", FP32, 4096, 4096, 40, "xla"),
        # SDXL's heads, and the autoencoder's one
        ("gpu", BF16, 4096, 4096, 64, "cudnn"),
        ("gpu", BF16, 4096, 4096, 512, "xla"),
        ("gpu", BF16, 4096, 4096, 36, "xla"),
        # The TPU's kernel takes whole blocks of 128 tokens.
        ("tpu", BF16, 4096, 4096, 64, "flash"),
        ("tpu", BF16, 1024, 1024, 40, "flash"),
        ("tpu", BF16, 1536, 1536, 64, "flash"),
        ("tpu", BF16, 576, 576, 64, "xla"),
        ("tpu", BF16, 256, 256, 160, "xla"),
        ("tpu", BF16, 4096, 77, 40, "xla"),
        ("tpu", FP32, 4096, 4096, 64, "xla"),
        ("tpu", BF16, 4096, 4096, 512, "xla"),
        ("cpu", FP32, 64, 64, 16, "heads_first"),
        ("cpu", FP32, 64, 16, 16, "heads_first"),
        ("cpu", FP32, 16, 16, 24, "xla"),
        ("cpu", FP32, 4096, 4096, 40, "heads_first"),
    ],
)
def test_the_implementation_fits_device_dtype_and_shape(
    backend, dtype, queries, keys, head_dim, expected
):
    found = attention_implementation(backend, dtype, queries=queries, keys=keys, head_dim=head_dim)
    assert found == expected


@pytest.mark.parametrize("implementation", ["xla", "heads_first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(FP32, 2e-6), (BF16, 2e-2)])
def test_attention_is_that_of_the_formula(implementation, dtype, tolerance, monkeypatch):
    monkeypatch.setenv(VARIABLE, implementation)
    shapes = [(2, 9, 3, 8), (2, 5, 3, 8), (2, 5, 3, 8)]
    keys = jax.random.split(jax.random.key(0), 3)
    parts = [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]
    out = attend(*parts)
    q, k, v = (np.asarray(part, np.float64) for part in parts)
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(8))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=0)


def test_rows_that_tpus_do_not_divide_are_left_to_xla():
    shape = {"queries": 4096, "keys": 4096, "head_dim": 64}
    assert attention_implementation("tpu", BF16, **shape, divides=False) == "xla"
    assert attention_implementation("gpu", BF16, **shape, divides=False) == "cudnn"


def test_each_of_several_tpus_attends_from_its_own_rows():
    found = said_on(4, "mesh_attention.py", environment={VARIABLE: "flash"})
    assert min(found["kernels"]) >= 1 and found["collectives"] == []
    of_drawing, of_gradient = found["errors"]
    assert "4 devices cannot divide 3 rows" in found["refused"]
    assert of_drawing < 2e-6 and of_gradient < 2e-3  # gradients are of about 1000


@pytest.mark.parametrize(("queries", "keys"), [(256, 384), (128, 512)])
def test_the_kernel_for_tpus_and_its_gradient_are_those_of_the_formula(queries, keys, monkeypatch):
    monkeypatch.setenv(VARIABLE, "flash")
    random = np.random.default_rng(0)
    shapes = [(2, queries, 2, 40), (2, keys, 2, 40), (2, keys, 2, 40), (2, queries, 2, 40)]
    q, k, v, pull = (random.standard_normal(shape) for shape in shapes)
    with pltpu.force_tpu_interpret_mode():
        out, back = jax.vjp(attend, *(jnp.asarray(part, FP32) for part in (q, k, v)))
        found = (out, *back(jnp.asarray(pull, FP32)))
    scores = np.exp(np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(40))
    weights = scores / scores.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v)
    # d softmax: P (dP - sum of dP P), derived anew
    of_weights = np.einsum("bnhd,bmhd->bhnm", pull, v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(axis=-1, keepdims=True))
    gradients = (
        np.einsum("bhnm,bmhd->bnhd", of_scores, k) / np.sqrt(40),
        np.einsum("bhnm,bnhd->bmhd", of_scores, q) / np.sqrt(40),
        np.einsum("bhnm,bnhd->bmhd", weights, pull),
    )
    for ours, theirs in zip(found, (expected, *gradients), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, atol=2e-5)


def test_the_kernel_for_tpus_refuses_parts_of_blocks(monkeypatch):
    monkeypatch.setenv(VARIABLE, "flash")
    q = jnp.zeros((1, 100, 1, 8), BF16)
    with pytest.raises(UsageError, match="multiples of 128 tokens, not 100"):
        attend(q, q, q)


def test_an_unknown_implementation_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match="DIFFUSION_GRPO_ATTENTION is 'fast'; expected one of"):
        attention_implementation("cpu", FP32, queries=1, keys=1, head_dim=8)
