"""Train the embedded models from nothing: `python -m diffusion_grpo.shapes.pretrain`.

Three stages, each resumable (run the same command again) and a function of the seed:

    clip   the CLIP model, contrastively with hard negatives         → assets/shapes-clip
    vae    the autoencoder, on crops, then on whole pictures
    unet   the UNet, by the text tower of CLIP, which stays as it is → assets/shapes-diffusion

`clip` and `vae` do not need each other and can run side by side; `unet` needs both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.clip import CLIPModel, CLIPTextModel
from diffusion_grpo.models.unet import UNet2DConditionModel
from diffusion_grpo.models.vae import AutoencoderKL
from diffusion_grpo.pretrained import (
    StableDiffusion,
    load_clip,
    load_tensors,
    load_tokenizer,
    module_tensors,
    save_module,
)
from diffusion_grpo.resources import resource_path
from diffusion_grpo.schedule import SchedulerConfig, add_noise, alphas_cumprod, velocity
from diffusion_grpo.shapes import networks
from diffusion_grpo.shapes.fit import FitConfig, batches, digest, fit
from diffusion_grpo.shapes.render import render
from diffusion_grpo.shapes.scenes import IMAGE_SIZE, scene_batch
from diffusion_grpo.shapes.tokenizer import write_tokenizer
from diffusion_grpo.shapes.training_batches import (
    ClipBatches,
    Pictures,
    UNetBatches,
    draw_timesteps,
    names_a_plain_pair,
    states_a_place,
    tokenize,
)
from diffusion_grpo.tensor_files import read_safetensors

ENCODED = 256  # scenes that are encoded at a time
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [float(m) for m in MEAN],
    "image_std": [float(s) for s in STD],
    "do_convert_rgb": True,
}


def train_clip(
    build: Path, seed: int, *, steps: int, batch: int, negatives: int, workers: int
) -> None:
    """Train the CLIP model and write it to `build/shapes-clip`."""
    out = build / "shapes-clip"
    vocabulary = write_tokenizer(out, networks.TOKENS)
    tokenizer = load_tokenizer(out)
    config = networks.clip_config(vocabulary)
    model = CLIPModel(config, rngs=nnx.Rngs(seed))
    positions = model.vision_model.embeddings.position_embedding
    positions.embedding.set_value(jnp.asarray(networks.position_table()))
    graphdef, params = nnx.split((model, networks.Probes(nnx.Rngs(seed + 1))))

    def loss_fn(params: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, probes = nnx.merge(graphdef, params)
        pixels = (data["images"] / jnp.float32(255) - MEAN) / STD
        captions_of = {k: v for k, v in data.items() if k != "images"}
        return networks.contrastive_loss(model, probes, pixels, **captions_of, probe_weight=0.5)

    params = fit(
        params,
        loss_fn,
        ClipBatches(tokenizer, seed, batch, negatives),
        config=FitConfig(steps=steps, learning_rate=1e-3, ema=0.998, workers=workers),
        directory=build / "checkpoints" / "clip",
        key=jax.random.key(seed),
        name="clip",
        inputs={"seed": seed, "batch": batch, "negatives": negatives},
    )
    model, _ = nnx.merge(graphdef, params)
    fields = config.to_dict() | {"architectures": ["CLIPModel"], "dtype": "float16"}
    save_module(model, out, fields, stem="model", dtype=np.float16)
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def train_vae(build: Path, seed: int, crop_steps: int, steps: int, decoder_steps: int) -> None:
    """Train the autoencoder and write `build/vae`.

    On crops, then on whole pictures, then its decoder alone.
    """
    graphdef, params = nnx.split(AutoencoderKL(networks.VAE, rngs=nnx.Rngs(seed)))

    def pictures(step: int, n: int, offset: int) -> np.ndarray:
        return render(scene_batch(seed + offset, step, n))

    def crops(step: int, *, n: int = 16, side: int = 32) -> np.ndarray:
        scenes = scene_batch(seed + 1, step, n)
        images = render(scenes)
        rng = np.random.default_rng([seed, step])
        # Around an object: a picture is mostly background.
        jitter = rng.integers(-12, 13, (2, n))
        left = np.clip(scenes.x[:, 0] - side / 2 + jitter[0], 0, IMAGE_SIZE - side).astype(int)
        top = np.clip(scenes.y[:, 0] - side / 2 + jitter[1], 0, IMAGE_SIZE - side).astype(int)
        return np.stack(
            [im[t : t + side, x : x + side] for im, t, x in zip(images, top, left, strict=True)]
        )

    def loss_fn(params: Any, images: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = images.astype(jnp.float32) / 127.5 - 1
        return networks.autoencoder_loss(nnx.merge(graphdef, params), x, key, kl_weight=1e-4)

    key = jax.random.key(seed)
    checkpoints = build / "checkpoints"
    params = fit(
        params,
        loss_fn,
        crops,
        config=FitConfig(steps=crop_steps, learning_rate=2e-3, ema=0.995),
        directory=checkpoints / "vae-crops",
        key=key,
        name="vae (crops)",
        inputs={"seed": seed},
    )
    params = fit(
        params,
        loss_fn,
        lambda step: pictures(step, 16, 2),
        config=FitConfig(steps=steps, learning_rate=1e-3, ema=0.995),
        directory=checkpoints / "vae",
        key=jax.random.fold_in(key, 1),
        name="vae",
        inputs={"seed": seed},
    )
    decoding, encoding = nnx.split_state(params, _is_decoder, ...)
    params = nnx.merge_state(
        encoding,
        fit(
            decoding,
            lambda decoding, images, key: loss_fn(nnx.merge_state(encoding, decoding), images, key),
            lambda step: pictures(step, 16, 3),
            config=FitConfig(steps=decoder_steps, learning_rate=5e-4, ema=0.995),
            directory=checkpoints / "vae-decoder",
            key=jax.random.fold_in(key, 2),
            name="vae (decoder)",
            inputs={"seed": seed},
        ),
    )
    vae = nnx.merge(graphdef, params)
    latents = encode_scenes(vae, seed + 4, 1024)[0]
    fields = _diffusers_config("AutoencoderKL", networks.VAE)
    fields["scaling_factor"] = round(float(1 / latents.astype(np.float32).std()), 5)
    save_module(vae, build / "vae", fields, dtype=np.float16)


def _is_decoder(path: tuple[Any, ...], value: Any) -> bool:
    return path[0] in ("decoder", "post_quant_conv")


def _diffusers_config(name: str, config: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from diffusers import __version__

    return {"_class_name": name, "_diffusers_version": __version__} | asdict(config)


def encode_scenes(
    vae: AutoencoderKL, seed: int, n: int, *, chunk: int = ENCODED, workers: int = 0
) -> tuple[np.ndarray, list[str]]:
    """Return the latents' means (unscaled, float16 `[n, h, w, c]`) and captions of `n` scenes."""
    graphdef, params = nnx.split(vae)
    encode = jax.jit(
        lambda p, x: nnx.merge(graphdef, p).encode(x.astype(jnp.float32) / 127.5 - 1)[0]
    )
    latents, texts = [], []
    for images, chunk_texts in batches(Pictures(seed, chunk), range(n // chunk), workers=workers):
        latents.append(np.asarray(encode(params, images), np.float16))
        texts += chunk_texts
    return np.concatenate(latents), texts


def load_vae(directory: Path) -> tuple[AutoencoderKL, float]:
    """Load the trained autoencoder and its scaling factor."""
    from diffusion_grpo.models.vae import VAEConfig

    config = VAEConfig.from_dict(json.loads((directory / "config.json").read_text()))
    vae = load_tensors(AutoencoderKL, config, read_safetensors(directory), source=str(directory))
    return vae, config.scaling_factor


def train_unet(
    build: Path,
    seed: int,
    *,
    steps: int,
    batch: int,
    scenes: int,
    workers: int,
    early_share: float,
    place_share: float,
    pair_share: float,
) -> None:
    """Train the UNet and write `build/shapes-diffusion`.

    Its text encoder is CLIP's text tower, not trained along, as Stable Diffusion's is: a tower that
    was trained along kept whether objects are beside or above each other, and lost which is where
    (docs/learning.md).
    """
    vae, scaling = load_vae(build / "vae")
    clip, tokenizer, _ = load_clip(build / "shapes-clip")
    text_config = networks.clip_config(len(tokenizer)).text_config
    tensors = {
        name.removeprefix("text_model."): value
        for name, value in module_tensors(clip).items()
        if name.startswith("text_model.")
    }
    text_encoder = load_tensors(CLIPTextModel, text_config, tensors, source="CLIP's text tower")
    unet = UNet2DConditionModel(networks.UNET, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(unet)

    of_vae = digest(nnx.state(vae))
    cache = build / f"latents-{seed}-{scenes}-{of_vae}.npz"
    if not cache.is_file():
        latents, texts = encode_scenes(vae, seed + 5, scenes, workers=workers)
        scratch = cache.with_suffix(".tmp.npz")  # a kill in between leaves no half of a file
        np.savez(scratch, latents=latents, ids=tokenize(tokenizer, texts))
        os.replace(scratch, cache)
    data = np.load(cache)
    latents, ids = data["latents"], data["ids"]
    schedule = SchedulerConfig.from_dict(networks.SCHEDULER)
    table = jnp.asarray(alphas_cumprod(schedule), jnp.float32)

    batch_fn = UNetBatches(
        latents,
        ids,
        np.flatnonzero(states_a_place(tokenizer, ids)),
        np.flatnonzero(names_a_plain_pair(tokenizer, ids)),
        tokenize(tokenizer, [""])[0],
        seed,
        batch,
        place_share,
        pair_share,
    )

    def loss_fn(params: Any, data: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        unet = nnx.merge(graphdef, params)
        clean = data["latents"].astype(jnp.float32) * jnp.float32(scaling)
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, clean.shape)
        timesteps = draw_timesteps(time_key, batch, early_share)
        noisy = add_noise(table, clean, noise, timesteps)
        target = velocity(table, clean, noise, timesteps)
        context = text_encoder(data["ids"]).last_hidden_state
        return jnp.square(unet(noisy, timesteps, context) - target).mean(), {}

    params = fit(
        params,
        loss_fn,
        batch_fn,
        config=FitConfig(steps=steps, learning_rate=2e-3, ema=0.999),
        directory=build / "checkpoints" / "unet",
        key=jax.random.key(seed),
        name="unet",
        inputs={
            "seed": seed,
            "batch": batch,
            "scenes": scenes,
            "early_share": early_share,
            "place_share": place_share,
            "pair_share": pair_share,
            "vae": of_vae,
            "text_encoder": digest(nnx.state(text_encoder)),
        },
    )
    unet = nnx.merge(graphdef, params)
    StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler_config=schedule,
        configs={
            "model_index": _model_index(),
            "unet": _diffusers_config("UNet2DConditionModel", networks.UNET),
            "vae": json.loads((build / "vae" / "config.json").read_text()),
            "text_encoder": text_config.to_dict() | {"architectures": ["CLIPTextModel"]},
            "scheduler": networks.SCHEDULER,
        },
        sampling=networks.SAMPLING,
    ).save_pretrained(build / "shapes-diffusion", dtype=np.float16)


def _model_index() -> dict[str, Any]:
    from diffusers import __version__

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
    }


def install(build: Path, assets: Path) -> None:
    """Copy the trained models from the build folder to `assets/`.

    Raises:
        UsageError: there is none; or afterwards the text encoder of shapes-diffusion would not be
            the text tower of shapes-clip.
    """
    built = [name for name in ("shapes-clip", "shapes-diffusion") if (build / name).is_dir()]
    if not built:
        raise UsageError(
            f"{build} has neither shapes-clip nor shapes-diffusion; expected a trained model: run "
            "the stages clip, vae and unet first"
        )
    clip, pipeline = (
        (build if name in built else assets) / name for name in ("shapes-clip", "shapes-diffusion")
    )
    _check_text_encoder(clip, pipeline)
    for name in built:
        shutil.copytree(build / name, assets / name, dirs_exist_ok=True)


def _check_text_encoder(clip: Path, pipeline: Path) -> None:
    """Check that a pipeline's text encoder is a CLIP model's text tower, number by number.

    Raises:
        UsageError: it is not.
    """
    both, encoder = read_safetensors(clip), read_safetensors(pipeline / "text_encoder")
    tower = {name for name in both if name.startswith("text_model.")}
    same = tower == set(encoder) and all(np.array_equal(both[n], encoder[n]) for n in tower)
    if not same:
        raise UsageError(
            f"the text encoder of {pipeline} is not the text tower of {clip}; expected a pipeline "
            "trained with it: run the stage unet after the stage clip, in the same --build"
        )


def _check_arguments(args: argparse.Namespace) -> None:
    """Find what no stage can use, before one is run.

    Raises:
        UsageError: an argument, or what a stage needs of the one before it.
    """
    known = ("clip", "vae", "unet", "install")
    if unknown := sorted(set(args.stages) - set(known)):
        raise UsageError(f"unknown stage {unknown[0]!r}; expected {', '.join(known)}")
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name.endswith(("_steps", "_batch")) and value < 1:
            raise UsageError(f"{flag} is {value}; expected 1 or more")
        if name.endswith("_share") and not 0 <= value <= 1:
            raise UsageError(f"{flag} is {value:g}; expected a share, from 0 to 1")
    if args.unet_place_share + args.unet_pair_share > 1:
        raise UsageError(
            f"--unet-place-share {args.unet_place_share:g} and --unet-pair-share "
            f"{args.unet_pair_share:g} are shares of one batch; expected a sum of 1 at most"
        )
    if args.workers < 0:
        raise UsageError(f"--workers is {args.workers}; expected 0 or more processes")
    if args.unet_scenes < ENCODED or args.unet_scenes % ENCODED:
        raise UsageError(
            f"--unet-scenes is {args.unet_scenes}; expected a multiple of {ENCODED}, which are "
            "encoded at a time"
        )
    if "unet" in args.stages:
        for stage, folder in (("vae", "vae"), ("clip", "shapes-clip")):
            if stage not in args.stages and not (args.build / folder / "config.json").is_file():
                raise UsageError(
                    f"the stage unet needs {args.build / folder}, which is not there; run the "
                    f"stage {stage} first"
                )


def main() -> None:
    """Run the stages named on the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded models from nothing.")
    parser.add_argument(
        "stages", nargs="*", default=["clip", "vae", "unet"], metavar="clip|vae|unet|install"
    )
    parser.add_argument(
        "--build", type=Path, default=Path("build/shapes"), help="checkpoints and results"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="processes that draw the scenes of clip and unet; one a core where a GPU trains, 0 "
        "where the CPU does",
    )
    parser.add_argument("--clip-steps", type=int, default=6000)
    parser.add_argument("--clip-batch", type=int, default=64)
    parser.add_argument("--vae-crop-steps", type=int, default=3000)
    parser.add_argument("--vae-steps", type=int, default=600)
    parser.add_argument("--vae-decoder-steps", type=int, default=300)
    parser.add_argument("--unet-steps", type=int, default=24000)
    parser.add_argument("--unet-batch", type=int, default=32)
    parser.add_argument("--unet-scenes", type=int, default=65536)
    parser.add_argument(
        "--unet-early-share",
        type=float,
        default=0.3,
        help="share of the timesteps drawn from the noisiest three tenths (0: as any other)",
    )
    parser.add_argument(
        "--unet-place-share",
        type=float,
        default=0.2,
        help="share of the scenes drawn from those whose captions state a place, beside their own",
    )
    parser.add_argument(
        "--unet-pair-share",
        type=float,
        default=0.1,
        help="the same of those whose captions name two objects and no color",
    )
    args = parser.parse_args()
    try:
        _check_arguments(args)
        args.build.mkdir(parents=True, exist_ok=True)
        _run(args)
    except UsageError as error:
        parser.error(str(error))


def _run(args: argparse.Namespace) -> None:
    """Run the stages."""
    if "clip" in args.stages:
        train_clip(
            args.build,
            args.seed,
            steps=args.clip_steps,
            batch=args.clip_batch,
            negatives=3,
            workers=args.workers,
        )
    if "vae" in args.stages:
        train_vae(
            args.build, args.seed, args.vae_crop_steps, args.vae_steps, args.vae_decoder_steps
        )
    if "unet" in args.stages:
        train_unet(
            args.build,
            args.seed,
            steps=args.unet_steps,
            batch=args.unet_batch,
            scenes=args.unet_scenes,
            workers=args.workers,
            early_share=args.unet_early_share,
            place_share=args.unet_place_share,
            pair_share=args.unet_pair_share,
        )
    if "install" in args.stages:
        install(args.build, resource_path("assets"))


if __name__ == "__main__":
    main()
