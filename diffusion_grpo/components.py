"""The parts of a checkpoint: directories and hub ids, configurations, single models.

What is missing, left over or not supported is an error that names it; `tensors` has the table of
tensor names. Safetensors only: nothing here can execute what it reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from diffusion_grpo.errors import UsageError
from diffusion_grpo.hub import (
    WEIGHTS,
    Layout,
    hub_patterns,
    keep_commit,
    kept_commit,
    split_revision,
    weight_patterns,
)
from diffusion_grpo.models.clip import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection
from diffusion_grpo.resources import resolve_checkpoint
from diffusion_grpo.tensor_files import (
    DIFFUSERS_STEM,
    has_variant,
    read_safetensors,
    variants_of,
    write_safetensors,
)
from diffusion_grpo.tensors import load_tensors, module_tensors

TextEncoder = CLIPTextModel | CLIPTextModelWithProjection


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: there is none.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"{path} does not exist; is this a checkpoint in the Diffusers layout?"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} is not valid JSON: {error}; mend it, or copy the checkpoint again"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def local_directory(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    layout: Layout = "diffusers",
) -> Path:
    """Resolve a directory, the name of a shipped checkpoint, or a hub id to a local directory.

    A pipeline's component that has no files of the variant is read without it, as Diffusers does.

    Args:
        name_or_path: what to resolve; of a single model on the hub also `owner/name@revision`.
        revision: of a hub repository: a branch, tag or commit.
        variant: of the weight files, such as `fp16`.
        layout: what a hub repository is read as: a pipeline with a folder for each component, the
            configurations of its networks, one model, or what goes with a model without its
            weights. Only the files that are read are downloaded.

    Raises:
        UsageError: there is no such directory and the hub has no such id or cannot be reached; a
            revision is asked of a directory; or no component of a pipeline has the variant.
    """
    place = resolve_checkpoint(str(name_or_path))
    if isinstance(place, Path):
        if revision is not None:
            raise UsageError(
                f"revision is {revision!r}, but checkpoint {str(name_or_path)!r} is a directory "
                "here, which has none; leave the revision out"
            )
        if layout == "diffusers":
            _without_variant(place, variant, str(name_or_path))
        return place
    if layout in ("transformers", "processor") and revision is None:
        place, revision = split_revision(place)
    on_main = revision is None
    if on_main:
        revision = kept_commit(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = hub_patterns(layout, variant)
    try:
        directory = Path(snapshot_download(place, revision=revision, allow_patterns=patterns))
        if on_main:
            keep_commit(place, directory)
        # Named by its commit: what is fetched then is of the same one.
        if layout == "diffusers" and (parts := _without_variant(directory, variant, place)):
            plain = weight_patterns(parts)
            snapshot_download(place, revision=directory.name, allow_patterns=plain)
        return directory
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        of = "" if revision is None else f" (revision {revision!r})"
        if isinstance(error, LocalEntryNotFoundError):
            raise UsageError(
                f"checkpoint {place!r}{of} is neither a directory here nor in the hub's cache, and "
                f"{_unreachable()}; connect and try again, or download it elsewhere and give the "
                "directory"
            ) from None
        raise UsageError(
            f"checkpoint {place!r}{of} is not a directory here, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the path or id, the "
            "network, HF_TOKEN for a private repository, or download it first and give the "
            "directory"
        ) from None


def commit_of(name_or_path: str | Path, directory: Path) -> str | None:
    """Return the commit that a checkpoint was read at, or None if it is of no hub repository.

    Args:
        name_or_path: as `local_directory` takes it.
        directory: what it returned; the hub's cache names it by the commit.
    """
    if isinstance(resolve_checkpoint(name_or_path), Path):
        return None
    return directory.name if re.fullmatch("[0-9a-f]{40}", directory.name) else None


def _without_variant(directory: Path, variant: str | None, name: str) -> list[str]:
    """Return the components of a pipeline that have no files of a variant; `name` is told.

    Raises:
        UsageError: none has any.
    """
    if variant is None:
        return []
    parts = [part for part in WEIGHTS if (directory / part).is_dir()]
    lacking = [part for part in parts if not has_variant(directory / part, variant)]
    if lacking and lacking == parts:
        there = sorted({other for part in parts for other in variants_of(directory / part)})
        raise UsageError(
            f"variant is {variant!r}, but no component of the checkpoint {name!r} has safetensors "
            f"of it; expected {' or '.join(there) or 'another'}, or leave the variant out to read "
            "the files without one"
        )
    return lacking


def _unreachable() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids asking the hub"
    return "the hub cannot be reached"


def save_module(
    module: nnx.Module,
    directory: str | Path,
    config: Mapping[str, Any],
    *,
    stem: str = DIFFUSERS_STEM,
    dtype: Any | None = None,
) -> None:
    """Write a module's weights and `config.json` as Diffusers or Transformers would.

    Args:
        module: one of this package's models.
        directory: where; made if absent.
        config: what `config.json` is to say.
        stem: of the weight files' names; above 5 GB there are several.
        dtype: of the written weights (default: as they are held).
    """
    directory = Path(directory)
    write_safetensors(module_tensors(module, dtype=dtype), directory, stem=stem)
    (directory / "config.json").write_text(
        json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    )


def _clip_config(kind: str, directory: Path) -> Any:
    import transformers

    fields = read_json(directory / "config.json")
    return getattr(transformers, kind).from_dict(fields)


def load_text_encoder(
    directory: Path,
    kind: type[TextEncoder] = CLIPTextModel,
    *,
    variant: str | None = None,
    **kw: Any,
) -> TextEncoder:
    """Load a CLIP text encoder from a directory with `config.json` and safetensors.

    Args:
        directory: of the component.
        kind: with a projection of the pooled output or without.
        variant: of the weight files.
        **kw: `dtype`, `param_dtype`, `on_host`.
    """
    config = _clip_config("CLIPTextConfig", directory)
    tensors = read_safetensors(directory, variant=variant)
    return load_tensors(kind, config, tensors, source=str(directory), **kw)


def load_tokenizer(directory: Path) -> Any:
    """Load a CLIP tokenizer from a directory."""
    from transformers import CLIPTokenizer

    if not (directory / "vocab.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise UsageError(
            f"{directory} holds neither vocab.json nor tokenizer.json; is it a CLIP tokenizer?"
        )
    return CLIPTokenizer.from_pretrained(directory)


def check_clip(name_or_path: str | Path) -> None:
    """Find out whether a CLIP model is there, by all that `load_clip` reads but its weights.

    Raises:
        UsageError: it is not, or a file of it cannot be read.
    """
    directory = local_directory(name_or_path, layout="transformers")
    _clip_config("CLIPConfig", directory)
    load_tokenizer(directory)
    read_json(directory / "preprocessor_config.json")


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
    return model, load_tokenizer(directory), read_json(directory / "preprocessor_config.json")
