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
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel as TorchUNet
from families import PUBLISHED
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_run import config as run_config
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from diffusion_grpo.cli import main
from diffusion_grpo.components import load_text_encoder, read_json
from diffusion_grpo.lora_files import load_lora
from diffusion_grpo.models import clip
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.shapes.tokenizer import write_tokenizer
from diffusion_grpo.tensor_files import read_safetensors
from diffusion_grpo.tensors import load_tensors
from diffusion_grpo.train import train

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


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    """A pipeline directory of Stable Diffusion 1.5's sizes, of Diffusers' writing."""
    folder = tmp_path_factory.mktemp("full")
    write_tokenizer(folder / "tokenizer", 77)
    family = PUBLISHED["sd15"]
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=TorchUNet(**family.unet),
        vae=TorchVAE(**family.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**family.text_encoder)),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        scheduler=DDIMScheduler.from_config(family.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd15", safe_serialization=True)
    gc.collect()
    return folder / "sd15"


def both(rng):
    """An input of the UNet, as ours and as theirs."""
    sample = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
    states = rng.normal(size=(1, 77, 768)).astype(np.float32)
    ours = (jnp.asarray(sample.transpose(0, 2, 3, 1)), jnp.array([801]), jnp.asarray(states))
    return ours, (torch.tensor(sample), torch.tensor([801]), torch.tensor(states))


def output(unet, inputs):
    if isinstance(unet, torch.nn.Module):
        with torch.no_grad():
            return unet(*inputs).sample.permute(0, 2, 3, 1).numpy()
    return np.asarray(jax.jit(lambda unet, *args: unet(*args))(unet, *inputs))


def test_an_adapter_trained_for_one_update_is_what_diffusers_loads(sd15, tmp_path):
    ours, theirs = both(np.random.default_rng(0))
    settings = run_config(
        sd15,
        tmp_path,
        model__trainable="lora",
        optim__learning_rate=0.01,
        rollout__prompts_per_iteration=1,
        rollout__images_per_prompt=2,
        rollout__microbatch=2,
        rollout__height=64,
        rollout__width=64,
        grpo__microbatch=2,
        eval__num_prompts=1,
        run__iterations=1,
        run__save_every=0,
    )
    train(settings, quiet=True)
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    assert main(["export", str(run), "--format", "lora", "--output", str(adapter)]) == 0
    gc.collect()
    found = output(load(UNet2DConditionModel, UNetConfig, run / "final" / "unet"), ours)
    gc.collect()
    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    untrained = output(pipe.unet, theirs)
    pipe.load_lora_weights(adapter)
    expected = output(pipe.unet, theirs)
    assert np.abs(expected - untrained).max() > 0.1 * expected.std()
    check("UNet of sd15 with an adapter trained here", found, expected)


def test_an_adapter_that_peft_writes_is_read(sd15, tmp_path):
    ours, theirs = both(np.random.default_rng(0))
    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    untrained = output(pipe.unet, theirs)
    torch.manual_seed(0)
    layers = ["to_q", "to_v", "to_out.0", "proj_in", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=layers))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
    )
    expected = output(pipe.unet, theirs)
    assert np.abs(expected - untrained).max() > 0.1 * expected.std()
    del pipe
    gc.collect()
    model = StableDiffusion.from_pretrained(sd15)
    load_lora(model, tmp_path)
    check("UNet of sd15 with an adapter of PEFT", output(model.unet, ours), expected)
