import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock as TorchTransformerBlock
from diffusers.models.attention_processor import Attention as TorchAttention
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D as TorchResnet
from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer
from flax import nnx
from torch_checkpoints import make_unet, randomize
from torch_weights import copy_torch_weights

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models import layers
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig

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
    ours = layers.sinusoidal_embedding(
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
        layers.Attention(32, heads=4, head_dim=8, context_dim=context, rngs=nnx.Rngs(0), **KW),
    )
    x = torch.randn(2, 9, 32)
    c = None if context is None else torch.randn(2, 5, context)
    with torch.no_grad():
        expected = _numpy(theirs(x, c))
    arguments = (_numpy(x),) if c is None else (_numpy(x), _numpy(c))
    assert _relative_error(_call(ours, *map(jnp.asarray, arguments)), expected) <= 1e-5


def test_transformer_block():
    theirs, ours = _pair(
        TorchTransformerBlock(32, 4, 8, cross_attention_dim=24),
        layers.BasicTransformerBlock(
            32, heads=4, head_dim=8, context_dim=24, rngs=nnx.Rngs(0), **KW
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
        layers.Transformer2DModel(
            32, heads=4, depth=2, context_dim=24, groups=8, linear_projection=linear,
            rngs=nnx.Rngs(0), **KW,
        ),
    )  # fmt: skip
    x, c = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = _nhwc(theirs(x, encoder_hidden_states=c, return_dict=False)[0])
    ours = _call(ours, jnp.asarray(_nhwc(x)), jnp.asarray(_numpy(c)))
    assert _relative_error(ours, expected) <= 1e-5


def _whole(torch_unet, height=8, width=8, dtype=jnp.float32):
    randomize(torch_unet)
    config = UNetConfig.from_dict(dict(torch_unet.config))
    unet = UNet2DConditionModel(config, dtype=dtype, rngs=nnx.Rngs(0))
    copy_torch_weights(torch_unet, unet)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, height, width, generator=generator)
    context = torch.randn(2, 7, config.cross_attention_dim, generator=generator)
    timesteps = torch.tensor([3, 801])
    with torch.no_grad():
        expected = _nhwc(torch_unet(sample, timesteps, context).sample)
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
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_whole_unet(fields):
    unet, inputs, expected = _whole(make_unet(**fields))
    assert _relative_error(_call(unet, *inputs), expected) <= 1e-4


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
    unet, inputs, _ = _whole(make_unet())
    graphdef, params = nnx.split(unet)
    unet.gradient_checkpointing = True
    remat, _ = nnx.split(unet)

    def gradient(graphdef):
        return jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*inputs)).sum()))(
            params
        )

    for a, b in zip(*map(jax.tree.leaves, (gradient(graphdef), gradient(remat))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_gradients_agree_with_torch():
    torch_unet = make_unet()
    unet, inputs, _ = _whole(torch_unet)
    graphdef, params = nnx.split(unet)
    ours = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*inputs)).mean()))(params)
    sample, timesteps, context = (torch.from_numpy(np.array(x)) for x in inputs)
    torch_unet(sample.permute(0, 3, 1, 2), timesteps, context).sample.square().mean().backward()
    expected = torch_unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.grad
    block = ours["down_blocks"][0]["attentions"][0]["transformer_blocks"][0]
    kernel = block["attn2"]["to_k"]["kernel"].get_value()
    assert _relative_error(np.asarray(kernel).T, _numpy(expected)) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"attention_head_dim": [8, 8]}, "attention_head_dim"),
        ({"resnet_time_scale_shift": "ada_group"}, "ada_group"),
    ],
)
def test_unsupported_fields_are_errors_that_name_them(fields, named):
    with pytest.raises(UsageError, match=named):
        UNetConfig.from_dict(fields)
