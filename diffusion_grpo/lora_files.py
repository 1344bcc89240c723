"""Files of LoRA adapters: written as Diffusers and PEFT load them, read in every common naming.

`of_kohya` renames what is written for the tools that read kohya's names alone.

Read are files of PEFT and Diffusers (`unet.….lora_A.weight`), of Diffusers' training scripts
(`lora.down`, a text encoder's `lora_linear_layer.down`), of older Diffusers
(`processor.to_q_lora.down`, a text encoder's `self_attn.to_q_lora.down`) and of kohya's scripts
(`lora_unet_….lora_down.weight` with `alpha`, by Diffusers' block names or the original ones). A
tensor that is none of these, or that fits no layer of the checkpoint, is an error that names it: an
adapter is never loaded in part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_grpo.components import read_json
from diffusion_grpo.errors import UsageError
from diffusion_grpo.lora import DEFAULT, Factors, insert_lora, layers, weight_lora
from diffusion_grpo.models.unet_config import UNetConfig
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.tensor_files import Entry, Tensors, open_file, write_file

FILE = "pytorch_lora_weights.safetensors"  # where `pipe.load_lora_weights` looks
PEFT_FILE = "adapter_model.safetensors"
PARTS = ("unet", "text_encoder", "text_encoder_2")

Adapters = Mapping[str, Mapping[str, Factors]]  # part of the pipeline → path of the layer → factors

_PREFIXES = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.text_model.": "text_encoder",
    "base_model.model.": "unet",
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_BLOCKS = (
    ("input_blocks", "middle_block", "output_blocks"),
    ("down_blocks", "mid_block", "up_blocks"),
)
# Of these beginnings PEFT takes the first product out of the base that it loads.
_SUBTRACTED = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BARE = re.compile(r"base_model\.model\.encoder\.layers\.")
_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?P<down>lora_A|lora_down|lora(?:_linear_layer)?\.down)"
    r"|(?P<up>lora_B|lora_up|lora(?:_linear_layer)?\.up))"
    r"(?:\.\w+)?\.weight$|(?P<scaled>.+)\.alpha$"
)
_OLD_ATTENTION = re.compile(r"\.(?:processor|(?P<text>self_attn))\.to_(?P<name>q|k|v|out)_lora\.")


def write_lora(adapters: Adapters, file: Path, *, dtype: Any = np.float32) -> Path:
    """Write adapters as `pipe.load_lora_weights` and PEFT load them.

    α/r is multiplied into B, so that every reader, whatever it knows of α, has the same adapter.

    Args:
        adapters: part of the pipeline → path of the layer → factors.
        file: where; its folder is made if absent.
        dtype: of the written tensors.

    Returns:
        The file.
    """
    entries: dict[str, Entry] = {}
    for part, factors in adapters.items():
        for path, (a, b, scale) in factors.items():
            # Beside `text_model`, not in it, stands SDXL's projection.
            bare = part == "unet" or path.startswith(("text_model.", "text_projection"))
            name = f"{part}.{'' if bare else 'text_model.'}{path}"
            entries[f"{name}.lora_A.weight"] = _entry(a, 1.0)
            entries[f"{name}.lora_B.weight"] = _entry(b, scale)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(Tensors(entries).cast(dtype).entries, file)
    return file


def of_kohya(tensors: Tensors, config: UNetConfig) -> Tensors:
    """Return the adapters of a file by the names of kohya's scripts, which web interfaces load.

    As there, SDXL's UNet has its layers' names in Stability AI's code, other UNets have Diffusers'.
    α is the rank: α/r is in B.

    Args:
        tensors: of a file that `write_lora` wrote.
        config: of the UNet that the adapters are for.
    """
    is_sdxl = config.addition_embed_type == "text_time"
    first = "lora_te1" if is_sdxl else "lora_te"
    prefixes = {"unet": "lora_unet", "text_encoder": first, "text_encoder_2": "lora_te2"}
    entries: dict[str, Entry] = {}
    for name, entry in tensors.entries.items():
        part, _, rest = name.partition(".")
        path, _, factor = rest.rpartition(".lora_")
        if is_sdxl and part == "unet":
            path = original_name(path, config)
        layer = f"{prefixes[part]}_{path.replace('.', '_')}"
        if factor == "A.weight":
            entries[f"{layer}.lora_down.weight"] = entry
            rank = np.asarray(entry.shape[0], np.float32)
            entries[f"{layer}.alpha"] = Entry((), rank.dtype, lambda rank=rank: rank)
        else:
            entries[f"{layer}.lora_up.weight"] = entry
    return Tensors(entries)


def _entry(factor: Any, scale: float) -> Entry:
    axes = _axes(factor.ndim)
    shape = tuple(factor.shape[i] for i in np.argsort(axes))

    def read() -> np.ndarray:
        return (np.asarray(factor, np.float32) * np.float32(scale)).transpose(np.argsort(axes))

    return Entry(shape, np.dtype(np.float32), read)


def _axes(ndim: int) -> tuple[int, ...]:
    """Return the axes that bring a tensor of a file to a layer's own layout."""
    return (1, 0) if ndim == 2 else (2, 3, 1, 0)


def load_lora(
    model: StableDiffusion, source: str | Path, *, name: str = DEFAULT, weight: float = 1.0
) -> None:
    """Attach the adapters of a file to a pipeline, in place.

    Args:
        model: the pipeline.
        source: a file, or a folder that Diffusers or PEFT wrote.
        name: of the adapter; several can be attached by different names, and add up.
        weight: factor on its α/r.

    Raises:
        UsageError: there is no such file, it is not understood in full, or does not fit.
    """
    for part, factors in read_lora(source, model).items():
        module = getattr(model, part)
        try:
            insert_lora(module, factors, name=name)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
        if weight != 1:
            weight_lora(module, {name: weight})


def read_lora(source: str | Path, model: StableDiffusion) -> dict[str, dict[str, Factors]]:
    """Read the adapters of a file for a pipeline.

    Args:
        source: a file, or a folder that Diffusers or PEFT wrote.
        model: the pipeline that they are for; it is not changed.

    Returns:
        Part of the pipeline → path of the layer → factors.

    Raises:
        UsageError: there is no such file, it is not understood in full, or does not fit.
    """
    file = _find(Path(source).expanduser())
    tensors = open_file(file)
    settings = _settings(file)
    names = {part: _names(model, part) for part in PARTS}
    found: dict[tuple[str, str], dict[str, str]] = {}
    # A file with the blocks of both Stability AI's and Diffusers' names has the latter, as there.
    twice = all(any(block in name for name in tensors for block in blocks) for blocks in _BLOCKS)
    for tensor in tensors:
        if twice and any(block in tensor for block in _BLOCKS[0]):
            continue
        match = _TENSOR.fullmatch(_OLD_ATTENTION.sub(_todays_attention, tensor))
        if match is None:
            raise UsageError(
                f"{file}: tensor {tensor!r} belongs to no adapter that is supported; expected "
                "LoRA as PEFT, Diffusers or kohya's scripts name it: lora_A and lora_B, or "
                "lora_down, lora_up and alpha (not DoRA, LoHa or LoKr)"
            )
        part, layer = _part(match["layer"] or match["scaled"])
        path = names[part].get(layer)
        if path is None:
            what = "" if getattr(model, part) is not None else ", which the checkpoint lacks"
            raise UsageError(
                f"{file}: tensor {tensor!r} is for layer {layer!r} of the {part}{what}; it has no "
                "linear layer or convolution of that name: the file is for another model"
            )
        kind = "a" if match["down"] else "b" if match["up"] else "alpha"
        kinds = found.setdefault((part, path), {})
        if kind in kinds:
            raise UsageError(
                f"{file}: tensors {kinds[kind]!r} and {tensor!r} are for the same layer; expected "
                "one adapter: write two files, and give both"
            )
        kinds[kind] = tensor
    adapters: dict[str, dict[str, Factors]] = {}
    for (part, path), kinds in found.items():
        if not {"a", "b"} <= kinds.keys():
            raise UsageError(
                f"{file}: the adapter of {path!r} in the {part} has {', '.join(kinds.values())} "
                "only; expected both factors, the file is damaged"
            )
        kernel = dict(layers(getattr(model, part)))[path].kernel  # type: ignore[attr-defined]
        a, b = (_factor(tensors[kinds[kind]], len(kernel.shape)) for kind in ("a", "b"))
        if "alpha" in kinds:
            scale = float(tensors[kinds["alpha"]].astype(np.float32).reshape(())) / a.shape[-1]
        else:
            scale = _scale(settings.get(part, {}), part, path, a.shape[-1])
        adapters.setdefault(part, {})[path] = Factors(a, b, scale)
    return adapters


def _find(source: Path) -> Path:
    candidates = [source / FILE, source / PEFT_FILE, source / "lora" / FILE]
    for file in [source] if source.suffix == ".safetensors" else candidates:
        if file.is_file():
            return file
    raise UsageError(
        f"LoRA {str(source)!r} is no .safetensors file, and no folder with {FILE} or {PEFT_FILE}"
    )


def _todays_attention(match: re.Match[str]) -> str:
    """Name the layer that a factor is for, where older Diffusers named its place in attention."""
    if match["text"]:
        return f".self_attn.{match['name']}_proj.lora."
    return f".to_{match['name']}{'.0' if match['name'] == 'out' else ''}.lora."


def _part(layer: str) -> tuple[str, str]:
    for prefix, part in _PREFIXES.items():
        if layer.startswith(prefix):
            rest = layer.removeprefix(prefix)
            # Transformers 5 has no `text_model` around a text encoder, that PEFT could write.
            return "text_encoder" if _BARE.match(layer) else part, rest
    return "unet", layer


def _names(model: StableDiffusion, part: str) -> dict[str, str]:
    """Return what the layers of a part are called in files: name → path here."""
    module = getattr(model, part)
    if module is None:
        return {}
    names: dict[str, str] = {}
    for path, _ in layers(module):
        others = [f"text_model.{path}", path.removeprefix("text_model.")]
        for name in (path, *(others if part != "unet" else [original_name(path, module.config)])):
            names[name] = names[name.replace(".", "_")] = path
    return names


def original_name(path: str, config: UNetConfig) -> str:
    """Return the name that a UNet's layer has in Stability AI's own code, as kohya's files use.

    Args:
        path: of the layer, by Diffusers' names.
        config: of the UNet.
    """
    depths = config.per_block("layers_per_block")
    places = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    for embedding, name in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        places |= {f"{embedding}.linear_1": f"{name}.0", f"{embedding}.linear_2": f"{name}.2"}
    places |= {
        f"mid_block.{part}": f"middle_block.{i}"
        for i, part in enumerate(("resnets.0", "attentions.0", "resnets.1"))
    }
    count, last = 1, len(depths) - 1
    for block, depth in enumerate(depths):
        for i in range(depth):
            for j, part in enumerate(("resnets", "attentions")):
                places[f"down_blocks.{block}.{part}.{i}"] = f"input_blocks.{count + i}.{j}"
        count += depth
        if block < last:
            places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for block, depth in enumerate(reversed(depths)):
        for i in range(depth + 1):
            for j, part in enumerate(("resnets", "attentions")):
                places[f"up_blocks.{block}.{part}.{i}"] = f"output_blocks.{count + i}.{j}"
        count += depth + 1
        j = 2 if "CrossAttn" in config.up_block_types[block] else 1
        places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{j}.conv"
    inside = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    words = path.split(".")
    for cut in range(len(words), 0, -1):
        place = places.get(".".join(words[:cut]))
        if place is not None:
            return ".".join([place, *(inside.get(word, word) for word in words[cut:])])
    return path


def _factor(tensor: np.ndarray, ndim: int) -> Any:
    """Bring a file's factor to a layer's layout; a 1×1 convolution may be written as linear."""
    if tensor.ndim == 2 and ndim == 4:
        tensor = tensor[:, :, None, None]
    elif tensor.ndim == 4 and ndim == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    if tensor.ndim not in (2, 4):
        raise UsageError(f"a LoRA factor has shape {tensor.shape}; expected 2 or 4 axes")
    return jnp.asarray(tensor.transpose(_axes(tensor.ndim)).astype(np.float32))


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    """Return PEFT's settings of each part: beside PEFT's own files, or in Diffusers' header."""
    beside = file.parent / "adapter_config.json"
    if file.name == PEFT_FILE and beside.is_file():
        found = read_json(beside)
        _check_base(found, beside)
        return dict.fromkeys(PARTS, found)
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    packed = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    settings: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for key, value in packed.items():
        part, dot, name = key.partition(".")
        if dot and part in settings:
            settings[part][name] = value
        else:
            settings["unet"][key] = value
    for found in settings.values():
        _check_base(found, file)
    return settings


def _check_base(settings: Mapping[str, Any], file: Path) -> None:
    """Check that an adapter is one to the checkpoint as it is.

    Raises:
        UsageError: training began with a product that was taken out of the base.
    """
    begun = str(settings.get("init_lora_weights")).lower()
    if begun.startswith(_SUBTRACTED):
        raise UsageError(
            f"{file}: init_lora_weights is {begun!r}, an adapter to a base of which its "
            "first product was taken out; expected one to the checkpoint as it is: write it "
            "anew by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _scale(settings: Mapping[str, Any], part: str, path: str, rank: int) -> float:
    """Return α/r by PEFT's settings; without any it is 1, as Diffusers has it."""
    alpha = settings.get("lora_alpha", rank)
    # Transformers 4 has a `text_model` around every text encoder.
    paths = (path,) if part == "unet" else (path, f"text_model.{path}")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if any(re.search(rf"(^|\.)(?:{pattern})$", name) for name in paths):
            alpha = value
            break
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
