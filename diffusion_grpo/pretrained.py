"""Checkpoint directories and hub ids in the Diffusers and Transformers layouts ⇄ NNX modules.

What is missing, left over or not supported is an error that names it; `tensors` has the table of
tensor names. Safetensors only: nothing here can execute what it reads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.hub import Layout, hub_patterns
from diffusion_grpo.models.clip import CLIPModel, CLIPTextModel
from diffusion_grpo.models.unet import UNet2DConditionModel, UNetConfig
from diffusion_grpo.models.vae import AutoencoderKL, VAEConfig
from diffusion_grpo.resources import resolve_checkpoint
from diffusion_grpo.sampling import SamplingDefaults, read_sampling, write_sampling
from diffusion_grpo.schedule import SchedulerConfig
from diffusion_grpo.tensor_files import write_file
from diffusion_grpo.tensors import checkpoint_slots as checkpoint_slots
from diffusion_grpo.tensors import load_tensors, module_tensors

# ------------------------------------------------------------------------------------ files and hub


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist; is this a checkpoint in the Diffusers layout?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_safetensors(directory: Path) -> dict[str, np.ndarray]:
    """Read a component's weights: one safetensors file, or the shards its index names.

    Raises:
        UsageError: there is no safetensors file (pickled weights are never read), or it cannot be
            parsed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    indexes = sorted(directory.glob("*.safetensors.index.json"))
    if indexes:
        files = sorted({directory / Path(n).name for n in _json(indexes[0])["weight_map"].values()})
    else:
        names = ("diffusion_pytorch_model.safetensors", "model.safetensors")
        files = [directory / name for name in names if (directory / name).is_file()]
    if not files:
        pickled = sorted(
            p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
        )
        if pickled:
            raise UsageError(
                f"{directory} holds pickled weights ({', '.join(pickled)}) but no .safetensors "
                "file. Pickles can execute code, so they are never loaded; convert them with "
                "`pipe.save_pretrained(dir, safe_serialization=True)` in Diffusers"
            )
        raise UsageError(
            f"{directory} holds no .safetensors file; expected one of {', '.join(names)}"
        )
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except FileNotFoundError:
            raise UsageError(f"{file} is named by {indexes[0].name} but does not exist") from None
        except SafetensorError as error:
            raise UsageError(f"{file} is not a readable safetensors file: {error}") from None
    return tensors


def local_directory(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    layout: Layout = "diffusers",
) -> Path:
    """Resolve a directory, the name of a shipped checkpoint, or a hub id to a local directory.

    Args:
        name_or_path: what to resolve.
        revision: hub revision.
        layout: what a hub repository is read as: a pipeline with a folder for each component, one
            model, or what goes with a model without its weights. Only the files that are read are
            downloaded.

    Raises:
        UsageError: there is no such directory and the hub has no such id or cannot be reached.
    """
    place = resolve_checkpoint(str(name_or_path))
    if isinstance(place, Path):
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = hub_patterns(layout)
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"checkpoint {place!r} is not a directory here, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the path or id, the "
            "network, HF_TOKEN for a private repository, or download it first and give the "
            "directory"
        ) from None


def save_module(
    module: nnx.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    filename: str = "diffusion_pytorch_model.safetensors",
    dtype: Any | None = None,
) -> None:
    """Write a module's weights and `config.json` as Diffusers or Transformers would."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_file(module_tensors(module, dtype=dtype).entries, directory / filename)
    (directory / "config.json").write_text(
        json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    )


def _clip_config(kind: str, directory: Path) -> Any:
    import transformers

    fields = _json(directory / "config.json")
    return getattr(transformers, kind).from_dict(fields)


def load_text_encoder(directory: Path, **kw: Any) -> CLIPTextModel:
    """Load a CLIP text encoder from a directory with `config.json` and safetensors."""
    config = _clip_config("CLIPTextConfig", directory)
    return load_tensors(
        CLIPTextModel, config, read_safetensors(directory), source=str(directory), **kw
    )


def load_tokenizer(directory: Path) -> Any:
    """Load a CLIP tokenizer from a directory."""
    from transformers import CLIPTokenizer

    if not (directory / "vocab.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{directory} holds neither vocab.json nor tokenizer.json; is it a CLIP tokenizer?"
        )
    return CLIPTokenizer.from_pretrained(directory)


def load_clip(
    name_or_path: str | Path,
    *,
    processor: str | Path | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    **kw: Any,
) -> tuple[CLIPModel, Any, dict[str, Any]]:
    """Load a CLIP model with both towers.

    Args:
        name_or_path: a directory in the Transformers layout, the name of a shipped model, or a hub
            id.
        processor: where its tokenizer and its image processor's configuration are, if elsewhere.
        tensors: weights to use instead of the directory's, by their names in Transformers.
        **kw: `dtype`, `param_dtype`.

    Returns:
        The model, its tokenizer, and its image processor's configuration.
    """
    layout: Layout = "transformers" if tensors is None else "processor"
    directory = local_directory(name_or_path, layout=layout)
    config = _clip_config("CLIPConfig", directory)
    if tensors is None:
        tensors = read_safetensors(directory)
    model = load_tensors(CLIPModel, config, tensors, source=str(directory), **kw)
    if processor is not None:
        directory = local_directory(processor, layout="processor")
    return model, load_tokenizer(directory), _json(directory / "preprocessor_config.json")


# ---------------------------------------------------------------------------------------- pipelines

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass
class StableDiffusion:
    """A text-to-image pipeline in memory: what Diffusers' `StableDiffusionPipeline` writes.

    Attributes:
        unet: the denoising network.
        vae: the autoencoder.
        text_encoder: the CLIP text encoder.
        tokenizer: transformers' CLIPTokenizer.
        scheduler_config: noise schedule and prediction type.
        configs: each component's JSON as read, written back by `save_pretrained`.
        source: the directory it was read from; files that are not touched are copied from there.
        sampling: what it is meant to be sampled with, if it says so.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: Any
    scheduler_config: SchedulerConfig
    configs: dict[str, dict[str, Any]]
    source: str = ""
    sampling: SamplingDefaults | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        unet_param_dtype: Any | None = None,
        revision: str | None = None,
    ) -> StableDiffusion:
        """Load a pipeline in the Diffusers layout.

        Args:
            name_or_path: a directory, the name of a shipped checkpoint, or a hub id.
            dtype: the compute dtype of all three networks.
            param_dtype: the dtype their parameters are held in.
            unet_param_dtype: the UNet's, if it differs (float32 master weights while the rest is
                bfloat16).
            revision: hub revision.

        Raises:
            UsageError: a file or tensor is missing, left over, misshapen or unsupported; the
                message names it.
        """
        directory = local_directory(name_or_path, revision=revision)
        check_layout(directory)
        kw = {"dtype": dtype, "param_dtype": param_dtype}
        configs = {
            "model_index": _json(directory / "model_index.json"),
            "unet": _json(directory / "unet" / "config.json"),
            "vae": _json(directory / "vae" / "config.json"),
            "text_encoder": _json(directory / "text_encoder" / "config.json"),
            "scheduler": _json(directory / "scheduler" / "scheduler_config.json"),
        }
        unet_config = UNetConfig.from_dict(configs["unet"])
        vae_config = VAEConfig.from_dict(configs["vae"])
        scheduler_config = SchedulerConfig.from_dict(configs["scheduler"])
        sampling = read_sampling(directory)
        unet_kw = kw | {
            "param_dtype": param_dtype if unet_param_dtype is None else unet_param_dtype
        }
        return cls(
            unet=load_tensors(
                UNet2DConditionModel,
                unet_config,
                read_safetensors(directory / "unet"),
                source=str(directory / "unet"),
                **unet_kw,
            ),
            vae=load_tensors(
                AutoencoderKL,
                vae_config,
                read_safetensors(directory / "vae"),
                source=str(directory / "vae"),
                **kw,
            ),
            text_encoder=load_text_encoder(directory / "text_encoder", **kw),
            tokenizer=load_tokenizer(directory / "tokenizer"),
            scheduler_config=scheduler_config,
            configs=configs,
            source=str(directory),
            sampling=sampling,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """The (height, width) of the images the checkpoint was trained for, in pixels."""
        size = self.unet.config.sample_size
        if size is None:
            raise UsageError(
                "the checkpoint's unet/config.json gives no sample_size; set --rollout.height and "
                "--rollout.width"
            )
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.vae.config.downscale_factor
        return factor * height, factor * width

    def save_pretrained(self, directory: str | Path, *, dtype: Any | None = None) -> None:
        """Write the pipeline as `diffusers.StableDiffusionPipeline.from_pretrained` loads it.

        Args:
            directory: where; made if absent.
            dtype: the dtype of the written weights (default: as they are held).
        """
        directory = Path(directory)
        save_module(self.unet, directory / "unet", self.configs["unet"], dtype=dtype)
        save_module(self.vae, directory / "vae", self.configs["vae"], dtype=dtype)
        save_module(
            self.text_encoder,
            directory / "text_encoder",
            self.configs["text_encoder"],
            filename="model.safetensors",
            dtype=dtype,
        )
        self.tokenizer.save_pretrained(directory / "tokenizer")
        (directory / "scheduler").mkdir(exist_ok=True)
        for name, config in (
            ("scheduler/scheduler_config.json", self.configs["scheduler"]),
            ("model_index.json", exported_index(self.configs["model_index"])),
        ):
            (directory / name).write_text(json.dumps(config, indent=2) + "\n")
        if self.sampling is not None:
            write_sampling(directory, self.sampling)


def exported_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """Return `model_index.json` for the components we write: optional ones are declared absent."""
    written = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    kept: dict[str, Any] = {
        k: v if k in written or not isinstance(v, list) else [None, None] for k, v in index.items()
    }
    kept["requires_safety_checker"] = False
    return kept


def check_layout(directory: Path) -> None:
    """Check that a directory is a Stable Diffusion pipeline before anything is read.

    Raises:
        UsageError: `model_index.json` is absent, or it names a pipeline or component that is not
            supported.
    """
    if not (directory / "model_index.json").is_file():
        raise UsageError(
            f"{directory} has no model_index.json, so it is not a pipeline in the Diffusers "
            "layout; give the directory that `pipe.save_pretrained` wrote (it holds unet/, vae/, "
            "text_encoder/, tokenizer/, scheduler/)"
        )
    index = _json(directory / "model_index.json")
    for part, expected in _components():
        given = index.get(part)
        if not isinstance(given, list) or len(given) != 2:
            raise UsageError(f"{directory}/model_index.json names no {part!r}; expected {expected}")
        if expected and given[1] not in expected:
            raise UsageError(
                f"{directory}/model_index.json: {part} is a {given[1]}, which is not supported; "
                f"expected {' or '.join(expected)}"
            )
        if not (directory / part).is_dir():
            raise UsageError(
                f"{directory} has no {part}/ directory, though its model_index.json names one"
            )
    extra = {"text_encoder_2", "tokenizer_2"} & {
        k for k, v in index.items() if isinstance(v, list) and v[0]
    }
    if extra:
        raise UsageError(
            f"{directory} is a {index.get('_class_name')}: a second text encoder is not supported "
            "yet"
        )


def _components() -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "unet", ("UNet2DConditionModel",)
    yield "vae", ("AutoencoderKL",)
    yield "text_encoder", ("CLIPTextModel",)
    yield "tokenizer", ("CLIPTokenizer", "CLIPTokenizerFast")
    yield "scheduler", ()
