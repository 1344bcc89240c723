"""CLIP against Transformers in torch: layer by layer, tower by tower, whole model."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from clip_checkpoints import (
    EOS,
    TOKENS,
    clip_config,
    randomized,
    text_config,
    vision_config,
    write_clip,
)
from flax import nnx
from torch_weights import copy_torch_weights, max_relative_error, torch_name
from transformers.activations import ACT2FN
from transformers.models.clip import modeling_clip

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models import clip, clip_layers

LAYER, WHOLE = 1e-5, 1e-4  # largest relative error in float32
KINDS = dict(dtype=jnp.float32, param_dtype=jnp.float32)


def token_ids(batch: int = 3) -> np.ndarray:
    """Return prompts of different lengths, padded to the full length with the end token."""
    ids = np.random.default_rng(0).integers(0, 97, (batch, TOKENS))
    ids[:, 0] = 97
    for row, end in enumerate(np.linspace(4, TOKENS - 1, batch).astype(int)):
        ids[row, end:] = EOS
    return ids


def pixels(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 32, 32, 3)).astype(np.float32)


def states(tokens: int, width: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(2, tokens, width)).astype(dtype)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """Return a torch tensor; images NHWC become NCHW."""
    return torch.tensor(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)


def with_weights_of(torch_module: Any, build: Any, *args: Any, **kwargs: Any) -> Any:
    """Build our module, abstractly so that no initializer runs, with the weights of torch's."""
    module = nnx.eval_shape(lambda: build(*args, rngs=nnx.Rngs(0), **kwargs))
    copy_torch_weights(torch_module, module)
    return module


def call(module: Any, *arrays: np.ndarray, method: str = "__call__") -> Any:
    """Call a method of our module compiled, its weights an argument."""
    graphdef, state = nnx.split(module)
    compiled = jax.jit(lambda state, *args: getattr(nnx.merge(graphdef, state), method)(*args))
    return compiled(state, *(jnp.asarray(array) for array in arrays))


@lru_cache
def text_pair(**changes):
    config = text_config(**changes)
    theirs = randomized(transformers.CLIPTextModel(config))
    return with_weights_of(theirs, clip.CLIPTextModel, config), theirs


def clip_pair(layers: int = 2, **kwargs):
    theirs = randomized(transformers.CLIPModel(clip_config(layers)))
    return with_weights_of(theirs, clip.CLIPModel, clip_config(layers), **kwargs), theirs


# --- Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(clip_layers.ACTIVATIONS))
def test_activation(name):
    x = np.linspace(-12, 12, 2001, dtype=np.float32)
    expected = ACT2FN[name](torch.tensor(x))
    np.testing.assert_allclose(clip_layers.ACTIVATIONS[name](jnp.asarray(x)), expected, atol=2e-6)


def test_exact_and_tanh_gelu_are_told_apart():
    x = jnp.linspace(-3, 3, 101)
    exact, tanh = clip_layers.ACTIVATIONS["gelu"](x), clip_layers.ACTIVATIONS["gelu_new"](x)
    assert jnp.abs(exact - tanh).max() > 1e-4


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_layer_norm(mean):
    theirs = randomized(torch.nn.LayerNorm(32, eps=1e-5))
    ours = with_weights_of(theirs, clip_layers.LayerNorm, 32, epsilon=1e-5, param_dtype=jnp.float32)
    x = states(5, 32) + np.float32(mean)
    assert max_relative_error(call(ours, x), theirs(torch.tensor(x))) <= LAYER


@pytest.mark.parametrize("causal", [True, False])
def test_attention(causal):
    config = text_config()
    theirs = randomized(modeling_clip.CLIPAttention(config))
    theirs.config._attn_implementation = "eager"
    ours = with_weights_of(theirs, clip_layers.CLIPAttention, config, causal=causal, **KINDS)
    x = states(9, 32)
    mask = torch.full((9, 9), -torch.inf).triu(1)[None, None] if causal else None
    expected = theirs(torch.tensor(x), attention_mask=mask)[0]
    assert max_relative_error(call(ours, x), expected) <= LAYER


def test_mlp():
    config = text_config(hidden_act="gelu")
    theirs = randomized(modeling_clip.CLIPMLP(config))
    ours = with_weights_of(theirs, clip_layers.CLIPMLP, config, **KINDS)
    x = states(9, 32)
    assert max_relative_error(call(ours, x), theirs(torch.tensor(x))) <= LAYER


def test_encoder_layer():
    config = vision_config()
    theirs = randomized(modeling_clip.CLIPEncoderLayer(config))
    ours = with_weights_of(theirs, clip_layers.CLIPEncoderLayer, config, causal=False, **KINDS)
    x = states(17, 48)
    expected = theirs(torch.tensor(x), attention_mask=None)
    assert max_relative_error(call(ours, x), expected) <= LAYER


def test_embeddings():
    theirs = randomized(modeling_clip.CLIPTextEmbeddings(text_config()))
    ours = with_weights_of(theirs, clip.CLIPTextEmbeddings, text_config(), **KINDS)
    ids = token_ids()[:, :11]
    assert max_relative_error(call(ours, ids), theirs(torch.tensor(ids))) <= LAYER

    theirs = randomized(modeling_clip.CLIPVisionEmbeddings(vision_config()))
    ours = with_weights_of(theirs, clip.CLIPVisionEmbeddings, vision_config(), **KINDS)
    x = pixels()
    assert max_relative_error(call(ours, x), theirs(to_torch(x))) <= LAYER


# --- Whole models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tokens", [TOKENS, 7])
def test_text_model_hidden_states(hidden_act, tokens):
    ours, theirs = text_pair(hidden_act=hidden_act)
    ids = token_ids()[:, :tokens]
    expected = theirs(torch.tensor(ids), output_hidden_states=True)
    actual = call(ours, ids)
    assert len(actual.hidden_states) == len(expected.hidden_states) == 3
    for ours_state, their_state in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert max_relative_error(ours_state, their_state) <= WHOLE
    assert max_relative_error(actual.last_hidden_state, expected.last_hidden_state) <= WHOLE


@pytest.mark.parametrize("eos_token_id", [EOS, 2])
def test_pooled_row_is_that_of_the_end_token(eos_token_id):
    ours, theirs = text_pair(eos_token_id=eos_token_id)
    ids = token_ids()
    expected = theirs(torch.tensor(ids)).pooler_output
    assert max_relative_error(call(ours, ids).pooled, expected) <= WHOLE


def test_legacy_pooling_takes_the_largest_id():
    ours, theirs = text_pair(eos_token_id=2)
    ids = token_ids()
    ids[:, 5], ids[:, -1] = EOS, 2  # the largest id is not at the end, and 2 is in the text
    ids[0, 5:] = 50
    expected = theirs(torch.tensor(ids)).pooler_output
    assert max_relative_error(call(ours, ids).pooled, expected) <= WHOLE


def test_padding_does_not_change_the_text_before_it():
    ours, _ = text_pair()
    ids = token_ids()
    changed = ids.copy()
    changed[0, 5:] = 3  # row 0 ends at position 4
    before, after = call(ours, ids), call(ours, changed)
    np.testing.assert_array_equal(before.last_hidden_state[0, :5], after.last_hidden_state[0, :5])
    np.testing.assert_array_equal(before.pooled, after.pooled)


def test_vision_model():
    theirs = randomized(transformers.CLIPVisionModel(vision_config()))
    ours = with_weights_of(theirs, clip.CLIPVisionModel, vision_config())
    x = pixels()
    expected = theirs(to_torch(x), output_hidden_states=True)
    actual = call(ours, x)
    for ours_state, their_state in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert max_relative_error(ours_state, their_state) <= WHOLE
    assert max_relative_error(actual.last_hidden_state, expected.last_hidden_state) <= WHOLE
    assert max_relative_error(actual.pooled, expected.pooler_output) <= WHOLE


def test_clip_features_and_logits():
    ours, theirs = clip_pair()
    ids, x = token_ids(), pixels()
    expected = theirs(input_ids=torch.tensor(ids), pixel_values=to_torch(x))
    text = call(ours, ids, method="get_text_features")
    image = call(ours, x, method="get_image_features")
    their_text = theirs.get_text_features(torch.tensor(ids)).pooler_output
    their_image = theirs.get_image_features(to_torch(x)).pooler_output
    assert max_relative_error(text, their_text) <= WHOLE
    assert max_relative_error(image, their_image) <= WHOLE
    logits = call(ours, ids, x)
    assert max_relative_error(logits, expected.logits_per_image) <= WHOLE
    assert float(jnp.ptp(logits)) > 0.1


def test_gradients():
    ours, theirs = clip_pair(layers=1, gradient_checkpointing=True)
    ids, x = token_ids(2), pixels()
    logits = theirs(input_ids=torch.tensor(ids), pixel_values=to_torch(x)).logits_per_image
    torch.nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    graphdef, state = nnx.split(ours)

    @jax.jit
    @jax.grad
    def gradient(state):
        logits = nnx.merge(graphdef, state)(jnp.asarray(ids), jnp.asarray(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(2)).mean()

    gradients = nnx.merge(graphdef, gradient(state))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    expected = with_weights_of(theirs, clip.CLIPModel, clip_config(layers=1))
    # Gradients that vanish in exact arithmetic (of the keys' biases) are noise beside the largest.
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(nnx.state(expected)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest),
        nnx.state(gradients),
        nnx.state(expected),
    )


def test_bfloat16_stays_near_float32():
    ours, theirs = clip_pair(dtype=jnp.bfloat16)
    ids, x = token_ids(), pixels()
    expected = theirs(input_ids=torch.tensor(ids), pixel_values=to_torch(x))
    text = call(ours.text_model, ids)
    image = call(ours, x, method="get_image_features")
    assert text.last_hidden_state.dtype == image.dtype == jnp.bfloat16
    states = expected.text_model_output.last_hidden_state
    assert 1e-4 < max_relative_error(text.last_hidden_state, states) <= 3e-2
    their_image = theirs.get_image_features(to_torch(x)).pooler_output
    assert max_relative_error(image, their_image) <= 3e-2


def test_bfloat16_parameters():
    bfloat16 = jnp.bfloat16
    model, theirs = clip_pair(dtype=bfloat16, param_dtype=bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(bfloat16)}
    ids, x = token_ids(), pixels()
    logits = call(model, ids, x)
    expected = theirs(input_ids=torch.tensor(ids), pixel_values=to_torch(x)).logits_per_image
    assert logits.dtype == jnp.float32
    assert max_relative_error(logits, expected) <= 5e-2


def test_initial_parameters_have_the_spread_of_transformers():
    theirs = transformers.CLIPModel(clip_config(layers=1))
    with jax.default_prng_impl("rbg"):  # quick to compile
        state = jax.jit(lambda: nnx.state(clip.CLIPModel(clip_config(1), rngs=nnx.Rngs(0))))()
    ours = {torch_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}
    for name, parameter in theirs.named_parameters():
        expected, actual = parameter.detach().numpy(), np.asarray(ours[name])
        if expected.size < 200:
            np.testing.assert_allclose(actual.mean(), expected.mean(), atol=0.1)
        else:
            np.testing.assert_allclose(actual.std(), expected.std(), rtol=0.2)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_act="gelu_fast"), "hidden_act = 'gelu_fast'"),
        (dict(eos_token_id=[98, 97]), "eos_token_id"),
    ],
    ids=str,
)
def test_unsupported_config_fields_are_named(changes, named):
    with pytest.raises(UsageError, match=named):
        clip.CLIPTextModel(text_config(**changes), rngs=nnx.Rngs(0))


def test_inputs_of_the_wrong_size_are_named():
    model = with_weights_of(transformers.CLIPModel(clip_config()), clip.CLIPModel, clip_config())
    with pytest.raises(UsageError, match="25 tokens"):
        model.get_text_features(jnp.zeros((1, TOKENS + 1), jnp.int32))
    with pytest.raises(UsageError, match="32x40"):
        model.get_image_features(jnp.zeros((1, 32, 40, 3)))


# --- The reward -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A CLIP checkpoint that Transformers wrote: random weights, a tokenizer of single letters."""
    return write_clip(tmp_path_factory.mktemp("clip"))


def their_logits(folder, images, prompts):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(input_ids=torch.tensor(encoded["input_ids"]), pixel_values=pixel_values)
    return output.logits_per_image.diagonal().numpy()


@pytest.mark.parametrize("scale", ["cosine", "logit"])
def test_reward_is_the_score_of_transformers(checkpoint, scale):
    from diffusion_grpo.reward import load_reward

    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    images = images.repeat(10, 1).repeat(10, 2)
    prompts = ["a b", "a cat", "dog", "a b", "zebra"]
    options = dict(model=str(checkpoint), scale=scale, batch_size="2")
    reward = load_reward("clip", options)
    assert reward.on_device
    scores = reward.function(jnp.asarray(images, jnp.float32) / 255, prompts, [{}] * 5)
    expected = their_logits(checkpoint, images, prompts) / (1 if scale == "logit" else np.exp(2.0))
    assert scores.dtype == jnp.float32 and np.ptp(expected) > 0.01
    np.testing.assert_allclose(scores, expected, atol=1e-3 * np.abs(expected).max())
    # A prompt seen before comes from the cache and an image's score depends on no other image.
    again = reward.function(jnp.asarray(images[3:], jnp.float32) / 255, prompts[3:], [{}] * 2)
    np.testing.assert_allclose(again, scores[3:], rtol=1e-5, atol=1e-6)


def test_reward_warns_once_of_a_prompt_that_is_cut(checkpoint):
    from diffusion_grpo.reward import load_reward

    reward = load_reward("clip", {"model": str(checkpoint)})
    image = jnp.zeros((1, 32, 32, 3))
    reward.function(image, ["a" * (TOKENS - 2)], [{}])
    with pytest.warns(UserWarning, match="30 tokens"):
        reward.function(image, ["a" * 28], [{}])
    reward.function(image, ["b" * 40], [{}])
