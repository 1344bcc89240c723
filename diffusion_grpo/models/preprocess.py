"""CLIP's image preprocessing on the accelerator: resize, center crop, normalize.

Agrees with Transformers' `CLIPImageProcessor`, which resizes with Pillow. Pillow's resampling is
linear and separable, so each axis is one matrix, computed once in NumPy for given sizes; crop and
padding are a choice of its rows. Like Pillow's, each pass is clipped and rounded to whole pixel
values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_grpo.errors import UsageError, suggest

# Pillow's codes of the filters: their half width, in output pixels when shrinking.
BILINEAR, BICUBIC = 2, 3
FILTER_SUPPORT = {BILINEAR: 1.0, BICUBIC: 2.0}

# Keys of a preprocessor_config.json that do not change the result for RGB arrays.
_IGNORED_KEYS = frozenset(
    (
        "_valid_processor_keys",
        "data_format",
        "device",
        "disable_grouping",
        "do_convert_rgb",
        "feature_extractor_type",
        "image_processor_type",
        "image_seq_length",
        "input_data_format",
        "processor_class",
        "return_tensors",
    )
)


@dataclass(frozen=True)
class ImageProcessorConfig:
    """What `CLIPImageProcessor` is to do; the defaults are its own.

    Attributes:
        do_resize: resize first.
        size: the length of the shortest edge, or exactly (height, width).
        resample: Pillow's code of the filter: 2 bilinear, 3 bicubic (Keys, a = −½); antialiased.
        do_center_crop: then crop, or pad with black, to `crop_size`.
        crop_size: (height, width).
        do_rescale: then multiply pixel values, 0 to 255, by `rescale_factor`.
        rescale_factor: usually 1/255.
        do_normalize: then subtract `image_mean` and divide by `image_std`.
        image_mean: one number a channel.
        image_std: one number a channel.
    """

    do_resize: bool = True
    size: int | tuple[int, int] = 224
    resample: int = BICUBIC
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageProcessorConfig:
        """Read a checkpoint's `preprocessor_config.json`, in its old and its new spelling.

        Args:
            values: the file's content; a key that is missing has `CLIPImageProcessor`'s default.

        Raises:
            UsageError: a key or a value that is not supported, named.
        """
        kind = values.get("image_processor_type", values.get("feature_extractor_type", "CLIP"))
        if not str(kind).startswith("CLIP"):
            raise _unsupported("image_processor_type", kind, "CLIPImageProcessor")
        given: dict[str, Any] = {}
        for key, value in values.items():
            if key in _IGNORED_KEYS or (value is None and key not in _READERS):
                continue
            if key not in _READERS:
                raise UsageError(
                    f"preprocessor_config.json: {key} = {value!r} is not supported"
                    f"{suggest(key, _READERS)}; expected keys are {', '.join(_READERS)}"
                )
            if value is not None:
                given[key] = _READERS[key](key, value)
        return cls(**given)


def _unsupported(key: str, value: Any, expected: str) -> UsageError:
    return UsageError(
        f"preprocessor_config.json: {key} = {value!r} is not supported; expected {expected}"
    )


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _read_flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _unsupported(key, value, "true or false")
    return value


def _read_size(key: str, value: Any) -> int | tuple[int, int]:
    edge = value
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        edge = value["shortest_edge"]
    if isinstance(edge, int) and _is_length(edge):
        return edge
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        if all(map(_is_length, value.values())):
            return value["height"], value["width"]
    raise _unsupported(key, value, '224, {"shortest_edge": 224} or {"height": 224, "width": 224}')


def _read_crop_size(key: str, value: Any) -> tuple[int, int]:
    if _is_length(value):
        return value, value
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        if all(map(_is_length, value.values())):
            return value["height"], value["width"]
    raise _unsupported(key, value, '224 or {"height": 224, "width": 224}')


def _read_resample(key: str, value: Any) -> int:
    if isinstance(value, bool) or value not in FILTER_SUPPORT:
        raise _unsupported(key, value, f"{BILINEAR} (bilinear) or {BICUBIC} (bicubic)")
    return int(value)


def _read_factor(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _unsupported(key, value, "a number, usually 1/255")
    return float(value)


def _read_channels(key: str, value: Any) -> tuple[float, ...]:
    ok = isinstance(value, list | tuple) and len(value) == 3
    if not ok or not all(isinstance(x, int | float) for x in value):
        raise _unsupported(key, value, "one number for each of the 3 channels")
    if key == "image_std" and not all(x > 0 for x in value):
        raise _unsupported(key, value, "positive numbers")
    return tuple(float(x) for x in value)


_READERS = {
    "do_resize": _read_flag,
    "size": _read_size,
    "resample": _read_resample,
    "do_center_crop": _read_flag,
    "crop_size": _read_crop_size,
    "do_rescale": _read_flag,
    "rescale_factor": _read_factor,
    "do_normalize": _read_flag,
    "image_mean": _read_channels,
    "image_std": _read_channels,
}


def clip_preprocess(
    images: Float[Array, "B H W 3"], config: ImageProcessorConfig
) -> Float[Array, "B h w 3"]:
    """Resize, center-crop and normalize images as `CLIPImageProcessor` does.

    Differentiable: rounding passes the gradient through, clipping stops it outside of the range.

    Args:
        images: in [0, 1], multiples of 1/255 for agreement with 8-bit images.
        config: what to do; static under `jax.jit`.

    Returns:
        The vision tower's pixel values, float32, with the spatial size of `config.crop_size`.
    """
    _, height, width, _ = images.shape
    rows, columns = axis_lengths(height, width, config)
    crop = config.crop_size if config.do_center_crop else (None, None)
    to_rows = axis_matrix(height, rows, crop[0], config.resample)
    to_columns = axis_matrix(width, columns, crop[1], config.resample)
    resized = (rows != height, columns != width)
    return _resample_and_normalize(images, to_rows, to_columns, resized, config)


def clip_letterbox(
    images: Float[Array, "B H W 3"], config: ImageProcessorConfig
) -> Float[Array, "B h w 3"]:
    """Resize the longest edge to fit, pad with black to a square, and normalize.

    What OpenCLIP calls `resize_longest_max`; for square images the same as `clip_preprocess`.

    Args:
        images: in [0, 1], multiples of 1/255 for agreement with 8-bit images.
        config: what to do; the square is `crop_size`. Static under `jax.jit`.

    Returns:
        The vision tower's pixel values, float32, with the spatial size of `config.crop_size`.
    """
    matrices, resized = [], []
    _, *lengths, _ = images.shape
    for length, edge in zip(lengths, config.crop_size, strict=True):
        fitted = round(length * (edge / max(lengths)))
        matrix = axis_matrix(length, fitted, None, config.resample)
        before = (edge - fitted) // 2
        matrices.append(np.pad(matrix, ((before, edge - fitted - before), (0, 0))))
        resized.append(fitted != length)
    rows, columns = resized
    return _resample_and_normalize(images, matrices[0], matrices[1], (rows, columns), config)


def _resample_and_normalize(
    images: Float[Array, "B H W 3"],
    to_rows: Float[np.ndarray, "h H"],
    to_columns: Float[np.ndarray, "w W"],
    resized: tuple[bool, bool],
    config: ImageProcessorConfig,
) -> Float[Array, "B h w 3"]:
    """Apply an axis's matrix each, rounding where it was resized, then the config's arithmetic."""
    pixels = images.astype(jnp.float32) * 255.0
    # Columns first, as Pillow does: the order matters because of the rounding in between.
    pixels = jnp.einsum("bhwc,xw->bhxc", pixels, to_columns, precision=jax.lax.Precision.HIGHEST)
    if resized[1]:
        pixels = _to_whole_pixels(pixels)
    pixels = jnp.einsum("bhwc,yh->bywc", pixels, to_rows, precision=jax.lax.Precision.HIGHEST)
    if resized[0]:
        pixels = _to_whole_pixels(pixels)
    if config.do_rescale:
        pixels = pixels * config.rescale_factor
    if config.do_normalize:
        mean, std = (
            np.asarray(channels, np.float32).reshape(1, 1, 1, 3)
            for channels in (config.image_mean, config.image_std)
        )
        pixels = (pixels - mean) / std
    return pixels


def _to_whole_pixels(pixels: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Round half up and clip to 0..255, with the gradient of the clip alone."""
    clipped = jnp.clip(pixels, 0.0, 255.0)
    return clipped + jax.lax.stop_gradient(jnp.floor(clipped + 0.5) - clipped)


def axis_lengths(height: int, width: int, config: ImageProcessorConfig) -> tuple[int, int]:
    """Return the height and width after the resize; the long edge is rounded down."""
    if not config.do_resize:
        return height, width
    if isinstance(config.size, tuple):
        return config.size
    edge = config.size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


@lru_cache(maxsize=64)
def axis_matrix(
    length: int, resized: int, crop: int | None, resample: int
) -> Float[np.ndarray, "x w"]:
    """Return the matrix that resizes one axis and then center-crops or zero-pads it.

    Args:
        length: pixels of the axis.
        resized: pixels after the resize.
        crop: pixels after the crop; None for no crop.
        resample: Pillow's code of the filter.

    Returns:
        `[crop or resized, length]`, float32; a row is the weights of one output pixel, all zero
        where it is padding. Do not write to it: it is cached.
    """
    matrix = np.eye(length) if resized == length else resize_matrix(length, resized, resample)
    if crop is not None and crop <= resized:
        top = (resized - crop) // 2
        matrix = matrix[top : top + crop]
    elif crop is not None:
        before = math.ceil((crop - resized) / 2)
        matrix = np.pad(matrix, ((before, crop - resized - before), (0, 0)))
    return matrix.astype(np.float32)


def resize_matrix(length: int, resized: int, resample: int) -> Float[np.ndarray, "x w"]:
    """Return Pillow's antialiased resampling of one axis as a matrix `[resized, length]`, float64.

    Output pixel i is centered at (i + ½)·s with s = length / resized; input pixel j has the weight
    k((j + ½ − center) / max(s, 1)), within the filter's support only, and the weights sum to one.
    """
    scale = length / resized
    stretch = max(scale, 1.0)
    support = FILTER_SUPPORT[resample] * stretch
    centers = (np.arange(resized)[:, None] + 0.5) * scale
    inputs = np.arange(length)[None, :]
    # Pillow truncates toward zero, and clips to the image.
    first = np.maximum(np.trunc(centers - support + 0.5), 0)
    last = np.minimum(np.trunc(centers + support + 0.5), length)
    weights = _filter((inputs + 0.5 - centers) / stretch, resample)
    weights = np.where((inputs >= first) & (inputs < last), weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _filter(x: Float[np.ndarray, "x w"], resample: int) -> Float[np.ndarray, "x w"]:
    """Return the triangle or the Keys kernel (Keys 1981, a = −½) at `x`."""
    x = np.abs(x)
    if resample == BILINEAR:
        return np.maximum(1.0 - x, 0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
