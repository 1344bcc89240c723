"""The published networks at their full size, with random weights that the torch classes wrote.

One component at a time, so that a machine of 24 GB holds them: torch writes it and says what it
gives, then it is read as a user's checkpoint is. The table of errors is printed (`-s`).
"""

import gc
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from families import PUBLISHED
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusion_grpo.components import load_text_encoder, read_json
from diffusion_grpo.models import clip
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.tensor_files import read_safetensors
from diffusion_grpo.tensors import load_tensors

pytestmark = pytest.mark.slow

KW = {"dtype": jnp.float32, "param_dtype": jnp.float32}
OURS = {kind.__name__: kind for kind in (clip.CLIPTextModel, clip.CLIPTextModelWithProjection)}
SIDE = 16  # of the latents; the weights are those of any size
BOUND = 1e-3  # of the output's standard deviation


def write(kind, config, folder):
    """Write a random network; returns it."""
    torch.manual_seed(0)
    module = kind(config) if isinstance(config, CLIPTextConfig) else kind(**config)
    module.eval().save_pretrained(folder, safe_serialization=True)
    return module


def load(kind, config_class, folder):
    config = config_class.from_dict(read_json(folder / "config.json"))
    return load_tensors(kind, config, read_safetensors(folder), source=str(folder), **KW)


def check(name, ours, theirs):
    error = np.abs(np.asarray(ours) - theirs).max() / theirs.std()
    print(f"\n{name}: {error:.2e} of the output's standard deviation")
    assert ours.shape == theirs.shape and error <= BOUND


@pytest.mark.parametrize("name", PUBLISHED)
def test_unet(name, tmp_path):
    fields = PUBLISHED[name].unet
    theirs = write(TorchUNet, fields, tmp_path)
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(1, 4, SIDE, SIDE)).astype(np.float32)
    states = rng.normal(size=(1, 77, fields["cross_attention_dim"])).astype(np.float32)
    added = {}
    if fields.get("addition_embed_type") == "text_time":
        ids = np.array([[1024, 1024, 0, 0, 1024, 1024]], np.float32)
        added = {"text_embeds": rng.normal(size=(1, 1280)).astype(np.float32), "time_ids": ids}
    with torch.no_grad():
        torch_added = {key: torch.tensor(value) for key, value in added.items()}
        out = theirs(
            torch.tensor(sample),
            torch.tensor([801]),
            torch.tensor(states),
            added_cond_kwargs=torch_added or None,
        )
        expected = out.sample.permute(0, 2, 3, 1).numpy()
    del theirs, out
    gc.collect()
    ours = load(UNet2DConditionModel, UNetConfig, tmp_path)
    found = jax.jit(lambda unet, *args, **kw: unet(*args, **kw))(
        ours, jnp.asarray(sample.transpose(0, 2, 3, 1)), jnp.array([801]), states, **added
    )
    check(f"UNet of {name}", found, expected)


def test_vae_decoder(tmp_path):
    theirs = write(TorchVAE, PUBLISHED["sd15"].vae, tmp_path)
    latents = np.random.default_rng(0).normal(size=(1, 4, SIDE, SIDE)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(torch.tensor(latents)).sample.permute(0, 2, 3, 1).numpy()
    ours = load(AutoencoderKL, VAEConfig, tmp_path)
    latents = jnp.asarray(latents.transpose(0, 2, 3, 1))
    check("decoder", jax.jit(lambda vae, latents: vae.decode(latents))(ours, latents), expected)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sd15", "text_encoder"), ("sd21", "text_encoder"), ("sdxl", "text_encoder_2")],
)
def test_text_encoder(name, part, tmp_path):
    config = CLIPTextConfig(**getattr(PUBLISHED[name], part))
    kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    theirs = write(kind, config, tmp_path)
    ids = np.random.default_rng(0).integers(3, 49000, (2, 77))
    with torch.no_grad():
        states = theirs(torch.tensor(ids), output_hidden_states=True).hidden_states[-2].numpy()
    del theirs
    ours = load_text_encoder(tmp_path, OURS[kind.__name__], **KW)
    found = jax.jit(lambda encoder, ids: encoder(ids).hidden_states[-2])(ours, ids.astype(np.int32))
    check(f"{part} of {name}", found, states)


def test_loading_holds_one_copy(tmp_path):
    """Peak resident memory of reading SD 1.5's UNet, less that of the program itself."""
    write(TorchUNet, PUBLISHED["sd15"].unet, tmp_path)
    gc.collect()
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    program = """
        import sys
        from pathlib import Path
        import jax, jax.numpy as jnp
        from diffusion_grpo.components import read_json
        from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
        from diffusion_grpo.tensor_files import read_safetensors
        from diffusion_grpo.tensors import load_tensors

        folder = Path(sys.argv[1])
        config = UNetConfig.from_dict(read_json(folder / "config.json"))
        jnp.zeros(1).block_until_ready()
        def peak():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0])

        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the parent's
        before = peak()
        kw = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        unet = load_tensors(
            UNet2DConditionModel, config, read_safetensors(folder), source="unet", **kw
        )
        jax.block_until_ready(jax.tree.leaves(unet))
        print(1024 * (peak() - before))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    peak = int(done.stdout)
    print(f"\nloading: {peak / size:.3f} of the weights' {size / 2**30:.2f} GiB")
    assert size < peak <= 1.2 * size
