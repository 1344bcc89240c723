import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel as TorchUNet
from diffusers.models.attention import BasicTransformerBlock as TorchTransformerBlock
from diffusers.models.attention import FeedForward as TorchFeedForward
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D as TorchResnet
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel as TorchDual
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer
from families import PUBLISHED, WIDTHS, small
from flax import nnx
from torch_checkpoints import TWO_LEVELS, make_unet, randomize
from torch_weights import copy_torch_weights, torch_name

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models import attention, embeddings, layers
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.tensors import abstract_module

KW = {"dtype": jnp.float32, "param_dtype": jnp.float32}


def _numpy(x):
    return x.detach().float().numpy()


def _nhwc(x):
    return _numpy(x).transpose(0, 2, 3, 1)


def _relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def _pair(torch_module, nnx_module):
    randomize(torch_module.eval())
    copy_torch_weights(torch_module, nnx_module)
    return torch_module, nnx_module


def _call(module, *args):
    return jax.jit(lambda module, *args: module(*args))(module, *args)


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0, 1])
def test_sinusoidal_embedding(flip, shift):
    timesteps = torch.tensor([0, 1, 17, 999])
    theirs = get_timestep_embedding(timesteps, 32, flip, shift)
    ours = embeddings.sinusoidal_embedding(
        jnp.asarray(timesteps.numpy()), 32, flip_sin_to_cos=flip, freq_shift=shift
    )
    # float32 sine of angles near 1000: the argument's own rounding is 3e-5
    assert np.abs(np.asarray(ours) - _numpy(theirs)).max() < 1e-4


@pytest.mark.parametrize("channels", [(16, 16), (16, 32)])
@pytest.mark.parametrize("shift", ["default", "scale_shift"])
def test_resnet_block(channels, shift):
    i, o = channels
    theirs, ours = _pair(
        TorchResnet(
            in_channels=i,
            out_channels=o,
            temb_channels=24,
            groups=8,
            eps=1e-5,
            time_embedding_norm=shift,
        ),
        layers.ResnetBlock2D(
            i,
            o,
            temb_channels=24,
            groups=8,
            eps=1e-5,
            time_scale_shift=shift,
            rngs=nnx.Rngs(0),
            **KW,
        ),
    )
    x, t = torch.randn(2, i, 6, 5), torch.randn(2, 24)
    with torch.no_grad():
        expected = _nhwc(theirs(x, t))
    assert (
        _relative_error(_call(ours, jnp.asarray(_nhwc(x)), jnp.asarray(_numpy(t))), expected)
        <= 1e-5
    )


@pytest.mark.parametrize("context", [None, 24])
def test_attention(context):
    theirs, ours = _pair(
        TorchAttention(32, cross_attention_dim=context, heads=4, dim_head=8),
        attention.Attention(32, heads=4, head_dim=8, context_dim=context, rngs=nnx.Rngs(0), **KW),
    )
    x = torch.randn(2, 9, 32)
    c = None if context is None else torch.randn(2, 5, context)
    with torch.no_grad():
        expected = _numpy(theirs(x, c))
    arguments = (_numpy(x),) if c is None else (_numpy(x), _numpy(c))
    assert _relative_error(_call(ours, *map(jnp.asarray, arguments)), expected) <= 1e-5


@pytest.mark.parametrize("kind", sorted(attention.FEED_FORWARDS))
def test_feed_forward(kind):
    theirs, ours = _pair(
        TorchFeedForward(8, activation_fn=kind),
        attention.FeedForward(8, kind, rngs=nnx.Rngs(0), **KW),
    )
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = _numpy(theirs(x))
    assert _relative_error(ours(jnp.asarray(_numpy(x))), expected) <= 1e-5


def test_upcast_attention_multiplies_in_float32():
    # Products near 1e3 lose whole units to bfloat16, and the softmax with them.
    ours = attention.Attention(
        16, heads=1, head_dim=16, upcast=True, rngs=nnx.Rngs(0), **KW | {"dtype": jnp.bfloat16}
    )
    x = jnp.asarray(np.random.default_rng(0).normal(0, 8, (1, 6, 16)), jnp.bfloat16)
    q, k, v = (np.asarray(p(x), np.float64)[0] for p in (ours.to_q, ours.to_k, ours.to_v))
    scores = q @ k.T / 4
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = (weights / weights.sum(1, keepdims=True)) @ v
    heads = jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16)[None]
    assert (ours(x) == ours.to_out[0](heads)).mean() > 0.95


@pytest.mark.parametrize("only_cross_attention", [False, True])
def test_transformer_block(only_cross_attention):
    theirs, ours = _pair(
        TorchTransformerBlock(
            32, 4, 8, cross_attention_dim=24, only_cross_attention=only_cross_attention
        ),
        attention.BasicTransformerBlock(
            32,
            heads=4,
            head_dim=8,
            context_dim=24,
            only_cross_attention=only_cross_attention,
            rngs=nnx.Rngs(0),
            **KW,
        ),
    )
    x, c = torch.randn(2, 9, 32), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = _numpy(theirs(x, encoder_hidden_states=c))
    ours = _call(ours, jnp.asarray(_numpy(x)), jnp.asarray(_numpy(c)))
    assert _relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("linear", [True, False])
def test_spatial_transformer(linear):
    theirs, ours = _pair(
        TorchTransformer(
            4, 8, in_channels=32, num_layers=2, cross_attention_dim=24, norm_num_groups=8,
            use_linear_projection=linear,
        ),
        attention.Transformer2DModel(
            32, heads=4, depth=2, context_dim=24, groups=8, linear_projection=linear,
            rngs=nnx.Rngs(0), **KW,
        ),
    )  # fmt: skip
    x, c = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = _nhwc(theirs(x, encoder_hidden_states=c, return_dict=False)[0])
    ours = _call(ours, jnp.asarray(_nhwc(x)), jnp.asarray(_numpy(c)))
    assert _relative_error(ours, expected) <= 1e-5


def _whole(torch_unet, height=8, width=8, dtype=jnp.float32, tokens=7, each=1, **extra):
    """Return our copy of a torch UNet, inputs, and torch's output for them.

    Of the 2 prompts, ours is given each once for `each` images, and torch once an image.
    """
    randomize(torch_unet)
    config = UNetConfig.from_dict(dict(torch_unet.config))
    unet = abstract_module(UNet2DConditionModel, config, dtype=dtype)
    copy_torch_weights(torch_unet, unet)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2 * each, 4, height, width, generator=generator)
    context = torch.randn(
        2, tokens, config.per_block("cross_attention_dim")[0], generator=generator
    )
    timesteps = torch.tensor([3, 801]).repeat(each)
    names = ("text_embeds", "time_ids")
    side = {k: extra.pop(k).repeat_interleave(each, 0) for k in names if k in extra}
    if side:
        extra["added_cond_kwargs"] = side
    repeated = context.repeat_interleave(each, 0)
    with torch.no_grad():
        expected = _nhwc(torch_unet(sample, timesteps, repeated, **extra).sample)
    inputs = (_nhwc(sample), timesteps.numpy().astype(np.int32), _numpy(context))
    return unet, tuple(map(jnp.asarray, inputs)), expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": (1, 2, 4), "layers_per_block": 2},
        {"transformer_layers_per_block": (1, 2, 2), "resnet_time_scale_shift": "scale_shift"},
        {"mid_block_type": None},
        {"mid_block_type": "UNetMidBlock2D"},
        {"flip_sin_to_cos": False, "freq_shift": 1, "center_input_sample": True},
        {"attention_head_dim": 8, "act_fn": "gelu"},
        {"upcast_attention": True},
        {"only_cross_attention": (True, False, True), "layers_per_block": (1, 2, 1)},
        {"each": 4, "only_cross_attention": (True, False, True)},
        {"mid_block_scale_factor": 2.0, "time_embedding_dim": 48, "conv_in_kernel": 1},
        {"time_embedding_act_fn": "mish", "timestep_post_act": "silu", "conv_out_kernel": 5},
        {
            "transformer_layers_per_block": (1, (1,), 2),
            "reverse_transformer_layers_per_block": (1, (2, 1), 1),
        },
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_whole_unet(fields):
    fields = dict(fields)
    each = fields.pop("each", 1)
    unet, inputs, expected = _whole(make_unet(**fields), each=each)
    assert _relative_error(_call(unet, *inputs), expected) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_class_embeds": 5}, torch.tensor([1, 4])),
        ({"class_embed_type": "timestep"}, torch.tensor([20, 350])),
        ({"class_embed_type": "identity"}, torch.randn(2, 64)),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
            torch.randn(2, 6),
        ),
        (
            {
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 6,
                "class_embeddings_concat": True,
            },
            torch.randn(2, 6),
        ),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_class_embeddings(fields, labels):
    plain = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",)}
    plain |= {"up_block_types": ("UpBlock2D",), "mid_block_type": None}
    unet, inputs, expected = _whole(make_unet(**plain | fields), class_labels=labels)
    labels = jnp.asarray(labels.numpy(), jnp.float32 if labels.is_floating_point() else jnp.int32)
    out = jax.jit(lambda unet, *args: unet(*args, class_labels=labels))(unet, *inputs)
    assert _relative_error(out, expected) <= 1e-4
    with pytest.raises(UsageError, match="class_labels is missing"):
        unet(*inputs)


def test_dual_transformer():
    """Layer by layer: Diffusers' own UNet passes its dual transformers an argument they refuse."""
    theirs, ours = _pair(
        TorchDual(4, 8, in_channels=32, cross_attention_dim=24, norm_num_groups=8),
        attention.DualTransformer2DModel(
            32, heads=4, context_dim=24, groups=8, rngs=nnx.Rngs(0), **KW
        ),
    )
    x, c = torch.randn(2, 32, 4, 6), torch.randn(2, 77 + 257, 24)
    with torch.no_grad():
        expected = _nhwc(theirs(x, c, return_dict=False)[0])
    x, c = jnp.asarray(_nhwc(x)), jnp.asarray(_numpy(c))
    assert _relative_error(_call(ours, x, c), expected) <= 1e-5
    with pytest.raises(UsageError, match=r"7 tokens.*77 \+ 257"):
        ours(x, c[:, :7])


def test_dual_cross_attention_has_the_parameters_of_diffusers():
    theirs = make_unet(dual_cross_attention=True, use_linear_projection=True)
    config = UNetConfig.from_dict(dict(theirs.config))
    ours = abstract_module(UNet2DConditionModel, config)
    copy_torch_weights(theirs, ours)  # strict in names and shapes


def test_prompts_that_do_not_divide_the_images_are_refused():
    unet, inputs, _ = _whole(make_unet(**TWO_LEVELS))
    x, timesteps, context = inputs
    with pytest.raises(UsageError, match="has 2 rows for 3 images; expected one an image, or a"):
        unet(jnp.concatenate([x, x[:1]]), jnp.resize(timesteps, 3), context)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("name", PUBLISHED)
def test_relatives_of_the_published_families(name, each):
    fields = small(PUBLISHED[name], 99).unet
    side = {}
    if "addition_embed_type" in fields:
        side["text_embeds"] = torch.randn(2, WIDTHS["text_encoder_2"])
        side["time_ids"] = torch.tensor([[64, 64, 0, 0, 64, 64], [96, 80, 8, 4, 64, 72]])
    unet, inputs, expected = _whole(make_unet(**fields), each=each, **side)
    given = {k: jnp.asarray(v.numpy().astype(np.float32)) for k, v in side.items()}
    out = jax.jit(lambda unet, *args: unet(*args, **given))(unet, *inputs)
    assert _relative_error(out, expected) <= 1e-4
    if side:
        with pytest.raises(UsageError, match="text_embeds is missing"):
            unet(*inputs)
    else:
        with pytest.raises(UsageError, match="text_embeds is given, but.*no use"):
            unet(*inputs, text_embeds=jnp.zeros((2, 3)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_describe_the_published_parameters(name):
    """The trees agree in every name and shape, at full size; nothing is allocated."""
    with torch.device("meta"):
        theirs = TorchUNet(**PUBLISHED[name].unet)
    config = UNetConfig.from_dict(dict(theirs.config))
    ours = abstract_module(UNet2DConditionModel, config)
    leaves = nnx.to_flat_state(nnx.state(ours, nnx.Param))
    shapes = {torch_name(path): sorted(leaf.shape) for path, leaf in leaves}
    assert shapes == {n: sorted(p.shape) for n, p in theirs.named_parameters()}


def test_sizes_that_do_not_halve_evenly():
    unet, inputs, expected = _whole(make_unet(), height=10, width=7)
    assert _relative_error(_call(unet, *inputs), expected) <= 1e-4


def test_bfloat16_is_close():
    unet, inputs, expected = _whole(make_unet(), dtype=jnp.bfloat16)
    out = _call(unet, *inputs)
    assert out.dtype == jnp.bfloat16
    # 8 bits of mantissa, about 40 layers
    assert np.abs(np.asarray(out, np.float32) - expected).std() / expected.std() < 0.03


def test_gradient_checkpointing_changes_no_gradient():
    # Two channels a group: of one alone the normalization takes away all that a bias does, and
    # the bias's gradient would be nothing but rounding.
    unet, inputs, _ = _whole(make_unet(**TWO_LEVELS, norm_num_groups=4))
    graphdef, params = nnx.split(unet)
    unet.gradient_checkpointing = True
    remat, _ = nnx.split(unet)

    def gradient(graphdef):
        return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*inputs)).sum()))(
            params
        )

    plain, recomputed = (jax.tree.leaves(gradient(graph)) for graph in (graphdef, remat))
    for a, b in zip(plain, recomputed, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("each", [1, 4])
def test_gradients_agree_with_torch(each):
    torch_unet = make_unet(**TWO_LEVELS)
    unet, inputs, _ = _whole(torch_unet, each=each)
    graphdef, params = nnx.split(unet)
    ours = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*inputs)).mean()))(params)
    sample, timesteps, context = (torch.from_numpy(np.array(x)) for x in inputs)
    context = context.repeat_interleave(each, 0)
    torch_unet(sample.permute(0, 3, 1, 2), timesteps, context).sample.square().mean().backward()
    expected = torch_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad
    block = ours["down_blocks"][0]["attentions"][0]["transformer_blocks"][0]
    kernel = block["attn2"]["to_k"]["kernel"].get_value()
    assert _relative_error(np.asarray(kernel).T, _numpy(expected)) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"class_embed_type": "image"}, "class_embed_type 'image'"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type 'text_image'"),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 9},
            "needs addition_time_embed_dim",
        ),
        ({"class_embeddings_concat": True}, "class_embeddings_concat needs class_embed_type"),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim"),
        ({"attention_type": "gated"}, "attention_type='gated'"),
        ({"transformer_layers_per_block": [1, [1], 1, 1]}, r"entry \[1\] for a block with 2"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(fields, named):
    with pytest.raises(UsageError, match=named):
        UNetConfig.from_dict(fields)
