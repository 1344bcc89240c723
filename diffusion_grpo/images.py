"""Pictures and their files: 8-bit images, PNG files that say how they were made, animations."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from diffusion_grpo.errors import UsageError

_FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
_EXIF_BYTES = 60_000  # of 65,533 that a JPEG segment has, some are EXIF's own
_LONGEST = {"WEBP": 16383, "JPEG": 65500}  # pixels a side that the format holds
_IMAGE_DESCRIPTION = 0x010E  # an EXIF tag


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images to 8 bits: round(255 · clip(x, 0, 1)), halves to even.

    Args:
        images: floating, any shape, in [0, 1]; values outside are clipped.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: not floating, or not finite.
    """
    # A half or bfloat16 product would round twice. bfloat16 is no NumPy dtype, but casts safely.
    if images.dtype.kind in "iub" or not np.can_cast(images.dtype, np.float64):
        raise ValueError(f"images have dtype {images.dtype}, expected floating in [0, 1]")
    wide = images.astype(np.promote_types(images.dtype, np.float32))
    finite = np.isfinite(wide)
    if not finite.all():
        first = int(np.argwhere(~finite)[0][0]) if wide.ndim else 0
        raise ValueError(f"image {first} holds NaN or infinity: has the model diverged?")
    return np.round(np.clip(wide, 0.0, 1.0) * 255.0).astype(np.uint8)


def check_image_path(path: str | Path) -> Path:
    """Check that an image can be written at a path, before any work is done for it.

    Args:
        path: the file to be; an existing one may be replaced.

    Returns:
        The path, with `~` expanded.

    Raises:
        UsageError: a name that ends in none of .png, .webp, .jpg and .jpeg, a directory, or a
            folder that is missing or not writable.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(
            f"image path {str(path)!r} is a directory; expected a file such as grid.png"
        )
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(
            f"image path {str(path)!r} does not end in one of {', '.join(_FORMATS)}: these formats "
            "are written"
        )
    parent = path.parent
    if not parent.is_dir():
        state = "is not a folder" if parent.exists() else "does not exist: create it first"
        raise UsageError(f"image path {str(path)!r}: the folder {str(parent)!r} {state}")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UsageError(f"image path {str(path)!r} is not writable: choose another folder")
    return path


def check_animation_path(path: str | Path) -> Path:
    """Check that an animation can be written at a path, as `check_image_path` does.

    Raises:
        UsageError: as there, or the path is no .webp.
    """
    path = check_image_path(path)
    if path.suffix.lower() != ".webp":
        raise UsageError(f"animation path {str(path)!r}: expected a name that ends in .webp")
    return path


def check_image_size(
    path: str | Path,
    size: tuple[int, int],
    *,
    animated: bool = False,
    mend: str = "show fewer or smaller images",
) -> None:
    """Check that the format of a path holds an image of a size, before any work is done for it.

    Args:
        path: ends in .png, .webp, .jpg or .jpeg.
        size: width and height of the image in pixels.
        animated: whether it is an animation, which no .png can be instead.
        mend: what else to do, for the message.

    Raises:
        UsageError: a side is longer than the format holds.
    """
    kind = _FORMATS[Path(path).suffix.lower()]
    most = _LONGEST.get(kind)
    if most is not None and max(size) > most:
        what, instead = ("animation", "") if animated else ("image", "write a .png, or ")
        raise UsageError(
            f"{what} path {str(path)!r}: {size[0]} x {size[1]} pixels are more than {kind} holds "
            f"({most}); {instead}{mend}"
        )


def save_image(
    path: str | Path, image: Image.Image, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a PNG, WebP or JPEG that says how it was made.

    A PNG has text chunks (tEXt; iTXt for text beyond Latin-1), one an entry; a WebP or JPEG has all
    entries as one JSON object in EXIF's ImageDescription. WebP and JPEG are lossy, of quality 92. A
    JPEG holds 64 kB of it: the longest texts are cut, and end in "…".

    Args:
        path: ends in .png, .webp, .jpg or .jpeg; its folder exists.
        image: what to write.
        metadata: keyword (1 to 79 Latin-1 characters) to value; what is not text is written as
            JSON.

    Raises:
        UsageError: as `check_image_path`, or the image is larger than the format holds.
        ValueError: a keyword that PNG does not admit.
    """
    path = check_image_path(path)
    kind = _FORMATS[path.suffix.lower()]
    for key in metadata or {}:
        if not (1 <= len(key) <= 79 and key.isprintable() and key == key.strip()):
            raise ValueError(f"PNG keyword {key!r}: expected 1 to 79 printable characters")
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        for key, value in (metadata or {}).items():
            info.add_text(key, value if isinstance(value, str) else json.dumps(value))
        image.save(path, "PNG", pnginfo=info)
        return
    check_image_size(path, image.size)
    exif = Image.Exif()
    fields = dict(metadata or {})
    exif[_IMAGE_DESCRIPTION] = _shortened(fields) if kind == "JPEG" else json.dumps(fields)
    image.save(path, kind, quality=92, exif=exif)


def _shortened(metadata: dict[str, Any]) -> str:
    """Return the entries as JSON of no more than a JPEG holds."""
    text = json.dumps(metadata)
    while len(text) > _EXIF_BYTES:
        longest = max(metadata, key=lambda key: len(json.dumps(metadata[key])))
        value = metadata[longest]
        whole = value if isinstance(value, str) else json.dumps(value)
        if len(whole) <= 2:  # too many entries to be mended by shorter texts
            break
        metadata[longest] = whole.removesuffix("…")[: max(1, len(whole) // 2)] + "…"
        text = json.dumps(metadata)
    return text


def to_image(pixels: np.ndarray) -> Image.Image:
    """Return uint8 [H, W, 3] as a Pillow image."""
    return Image.fromarray(pixels)


def save_animation(
    path: str | Path, frames: Sequence[Image.Image], *, seconds: float = 0.12, hold: float = 1.5
) -> None:
    """Write an animated WebP that plays forever and rests on its last frame.

    Args:
        path: ends in .webp.
        frames: one or more, of one size.
        seconds: how long a frame is shown.
        hold: how long the last one is.

    Raises:
        UsageError: as `check_animation_path`, or the frames are larger than WebP holds.
    """
    path = check_animation_path(path)
    check_image_size(path, frames[0].size, animated=True)
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * hold)]
    rest = list(frames[1:])
    frames[0].save(
        path, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=85
    )
