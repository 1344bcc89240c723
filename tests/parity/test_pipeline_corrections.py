"""What Diffusers' pipeline classes and scheduler classes make of files that lack fields."""

import importlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.pipeline import generate
from diffusion_grpo.pretrained import StableDiffusion, read_unet_config
from diffusion_grpo.schedule import SchedulerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # what is corrected is deprecated
    # Diffusers hands torch tensors to np.array, which NumPy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

diffusers: Any = importlib.import_module("diffusers")  # lazy: its names are found at run time

SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
PIPELINES = (
    "CycleDiffusionPipeline",
    "LEditsPPPipelineStableDiffusion",
    "LEditsPPPipelineStableDiffusionXL",
    "LatentConsistencyModelPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionDiffEditPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionLDM3DPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionPAGPipeline",
    "StableDiffusionPanoramaPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineSafe",
    "StableDiffusionSAGPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPipeline",
)
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 4


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("corrections") / "pipeline", **TWO_LEVELS)


@pytest.fixture(scope="module")
def parts(written):
    return diffusers.StableDiffusionPipeline.from_pretrained(written).components


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def use(directory: Path, kind: str, **fields: Any) -> None:
    """Put a scheduler's file, with these fields and no others, into a pipeline."""
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": kind} | fields))
    edit(directory / "model_index.json", scheduler=["diffusers", kind])


def build(name: str, parts: dict[str, Any], **changed: Any) -> Any:
    """Build a pipeline class of these components; it lacks all others."""
    kind = getattr(diffusers, name)
    given = parts | {"text_encoder_2": parts["text_encoder"], "tokenizer_2": parts["tokenizer"]}
    given |= changed | {"requires_safety_checker": False}
    parameters = inspect.signature(kind.__init__).parameters.values()
    required = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
    return kind(**required | {p.name: given[p.name] for p in parameters if p.name in given})


def built_with_ddim(directory: Path) -> Any:
    """Build Stable Diffusion's pipeline with DDIM; a file of that class has it anyway."""
    scheduler = diffusers.DDIMScheduler.from_pretrained(directory, subfolder="scheduler")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(directory, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("file", [{}, {"steps_offset": 0, "clip_sample": True}])
@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_pipeline_class_corrects_is_corrected(name, file, parts):
    unet = dict(parts["unet"].config) | {"sample_size": 32, "_diffusers_version": "0.8.1"}
    theirs = build(
        name,
        parts,
        unet=diffusers.UNet2DConditionModel.from_config(unet),
        scheduler=diffusers.DDIMScheduler.from_config(NOISE | file),
    )
    config = SchedulerConfig.from_dict(NOISE | file, pipeline=name)
    assert config.clip_sample == theirs.scheduler.config.clip_sample
    assert config.steps_offset == theirs.scheduler.config.steps_offset
    assert read_unet_config(unet, name).sample_size == theirs.unet.config.sample_size


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_s_file_is_read_as_stable_diffusion_reads_it(kind, parts):
    file = {"_class_name": kind} | NOISE
    scheduler = diffusers.DDIMScheduler.from_config(file)
    theirs = build("StableDiffusionPipeline", parts, scheduler=scheduler).scheduler.config
    config = SchedulerConfig.from_dict(file, pipeline="StableDiffusionPipeline")
    for name in set(SchedulerConfig.__dataclass_fields__) - {"default_spacing", "solver_options"}:
        assert getattr(config, name) == theirs[name], name
    assert (config.clip_sample, config.steps_offset) == (False, 1)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_absent_fields_of_the_model_are_those_of_the_class_that_wrote_the_file(kind):
    theirs = getattr(diffusers, kind)().config
    config = SchedulerConfig.from_dict({"_class_name": kind}, pipeline="StableDiffusionXLPipeline")
    assert config.clip_sample == theirs.get("clip_sample", False)
    for name in ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"):
        assert getattr(config, name) == theirs[name], name
    assert config.num_train_timesteps == theirs.num_train_timesteps
    ddim = diffusers.DDIMScheduler.from_config(theirs).config
    for name in ("timestep_spacing", "steps_offset", "set_alpha_to_one"):
        assert getattr(config, name) == ddim[name], name


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_pictures_of_an_incomplete_file_are_those_of_diffusers(kind, directory):
    use(directory, kind, **NOISE)
    pipe = built_with_ddim(directory)
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "output_type": "np"}
    theirs = 255 * pipe("a red circle", latents=torch.tensor(latents), **options).images
    ours = generate(
        StableDiffusion.from_pretrained(directory),
        ["a red circle"],
        num_steps=STEPS,
        guidance_scale=2.0,
        latents=jnp.asarray(latents.transpose(0, 2, 3, 1)),
    )
    assert theirs.std() > 10
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize("size", [32, 63, 64, 65, (32, 32)])
@pytest.mark.parametrize("version", [None, "0.2.2", "0.8.1.dev0", "0.9.0.dev0", "0.9.0", "1.0.0"])
def test_sample_size_of_an_old_unet_is_that_of_diffusers(version, size, parts):
    fields = dict(parts["unet"].config) | {"sample_size": size, "_diffusers_version": version}
    if version is None:
        del fields["_diffusers_version"]
    unet = diffusers.UNet2DConditionModel.from_config(fields)
    theirs = build("StableDiffusionPipeline", parts, unet=unet).unet.config.sample_size
    assert read_unet_config(fields, "StableDiffusionPipeline").sample_size == theirs


def test_what_is_corrected_is_saved_as_it_was_and_corrected_again(directory, tmp_path):
    use(directory, "DPMSolverMultistepScheduler", **NOISE)
    edit(directory / "unet" / "config.json", sample_size=16, _diffusers_version="0.6.0")
    model = StableDiffusion.from_pretrained(directory)
    assert model.image_size == (4 * 64, 4 * 64)
    model.save_pretrained(tmp_path / "ours")
    for name in ("scheduler/scheduler_config.json", "unet/config.json"):
        first, second = (json.loads((d / name).read_text()) for d in (directory, tmp_path / "ours"))
        assert first == second
    theirs, saved = (built_with_ddim(d) for d in (directory, tmp_path / "ours"))
    assert dict(saved.scheduler.config) == dict(theirs.scheduler.config)
    assert saved.unet.config.sample_size == theirs.unet.config.sample_size == 64
    again = StableDiffusion.from_pretrained(tmp_path / "ours")
    assert again.scheduler_config == model.scheduler_config
    assert again.image_size == model.image_size
