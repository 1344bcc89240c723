"""Decode images tile by tile: the pixels of the whole, in less memory.

A decoded pixel depends on what is around it through convolutions, within a margin, and on the whole
image through attention and the statistics of the GroupNorms. So the layers at lower resolutions,
attention among them, see the whole image; what follows, where the memory goes, is computed tile by
tile, each with the full margin around it, which is cut off afterwards. All tiles are normalized by
the statistics of the whole: each GroupNorm's are pooled over the tiles before the next one's are
measured. That costs a pass over the tiles for each GroupNorm, and there is no seam, nor a tile with
a tone of its own: the image is that of decoding the whole, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion_grpo.errors import UsageError
from diffusion_grpo.models.norms import Statistics, using


@runtime_checkable
class Autoencoder(Protocol):
    """What `decode_tiled` needs of an autoencoder."""

    config: Any
    decoder_margin: int
    local_scale: int

    def decode(self, latents: Array) -> Array:
        """Decode whole images: `decode_local(decode_global(latents))`."""
        ...

    def decode_global(self, latents: Array) -> Array:
        """Compute what needs the whole image."""
        ...

    def decode_local(self, features: Array) -> Array:
        """Compute the rest, at `local_scale` pixels a feature.

        But for GroupNorms, a pixel depends on features within `decoder_margin`.
        """
        ...


def receptive_margin(convolutions: Sequence[int], factor: int = 2) -> int:
    """Return how many pixels of the first resolution an image pixel depends on, to each side.

    Args:
        convolutions: the number of 3×3 convolutions in a row at each resolution, up to the image's;
            between them is nearest upsampling.
        factor: of the upsampling.
    """
    reach = 0
    for count in reversed(convolutions[1:]):
        reach = -(-(reach + count) // factor)
    return reach + convolutions[0]


def sliced(
    decode: Callable[[Array], Array], latents: Float[Array, "B h w c"]
) -> Float[Array, "B H W 3"]:
    """Decode one image after another: the memory of one, the same images."""
    return jax.lax.map(lambda one: decode(one[None])[0], latents)


def check_tile(autoencoder: Autoencoder, tile: int) -> None:
    """Check that a tile has something inside its margins.

    Args:
        autoencoder: an `AutoencoderKL` or `AutoencoderTiny`.
        tile: the side of a tile in image pixels.

    Raises:
        UsageError: it has not.
    """
    margin, scale = autoencoder.decoder_margin, autoencoder.local_scale
    if tile // scale <= 2 * margin:
        raise UsageError(
            f"vae_tile is {tile} pixels, which leaves nothing inside margins of {margin * scale} "
            f"pixels on each side; expected at least {(2 * margin + 1) * scale}"
        )


def decode_tiled(
    autoencoder: Autoencoder, latents: Float[Array, "B h w c"], *, tile: int
) -> Float[Array, "B H W 3"]:
    """Decode unscaled latents tile by tile; see the module's docstring.

    Args:
        autoencoder: an `AutoencoderKL` or `AutoencoderTiny`.
        latents: `[B, h, w, c]`.
        tile: the side of a tile in image pixels, with a margin on each side.

    Returns:
        Images, about [−1, 1]: those of `decode`, but for rounding.

    Raises:
        UsageError: the tile is no larger than its margins.
    """
    check_tile(autoencoder, tile)
    features = autoencoder.decode_global(latents)
    sides, scale, margin = (
        features.shape[1:3],
        autoencoder.local_scale,
        autoencoder.decoder_margin,
    )
    tile = tile // scale
    if tile >= max(sides):
        return autoencoder.decode_local(features)
    shape = tuple(min(tile, side) for side in sides)
    core = tuple(side if tile >= side else tile - 2 * margin for side in sides)
    rows, columns = (_windows(side, tile, margin) for side in sides)
    windows = [np.stack([row, column], axis=1) for row in rows for column in columns]
    windows = jnp.asarray(np.stack(windows), jnp.int32)  # [tiles, 3, 2]: see _windows

    def local(window: Int[Array, "3 2"], statistics: Statistics) -> Array:
        with using(statistics):
            return autoencoder.decode_local(_cut(features, window[0], shape))

    given: tuple[Any, ...] = ()
    for i in range(_count_norms(autoencoder, features)):

        def measure(window: Int[Array, "3 2"], i: int = i, given: Any = given) -> tuple[Array, Any]:
            statistics = Statistics(_owned(window, shape, core), given)
            local(window, statistics)  # XLA leaves out what follows the norm that is measured
            return statistics.weights.sum(), statistics.recorded[i]

        counts, moments = jax.lax.map(measure, windows)
        given += (_pooled(counts, *moments),)

    channels = autoencoder.config.out_channels
    out = jnp.zeros((len(latents), *(scale * side for side in sides), channels), features.dtype)

    def decode(out: Array, window: Int[Array, "3 2"]) -> tuple[Array, None]:
        image = local(window, Statistics(jnp.ones(shape, jnp.float32), given))
        pixels = _cut(image, scale * (window[1] - window[0]), tuple(scale * c for c in core))
        top, left = scale * window[1]
        return jax.lax.dynamic_update_slice(out, pixels.astype(out.dtype), (0, top, left, 0)), None

    return jax.lax.scan(decode, out, windows)[0]


def _count_norms(autoencoder: Autoencoder, features: Float[Array, "B h w c"]) -> int:
    """Return how many GroupNorms the local part of an autoencoder calls."""
    statistics = Statistics(jnp.ones((1, 1), jnp.float32))

    def call(features: Array) -> Array:
        with using(statistics):
            return autoencoder.decode_local(features)

    jax.eval_shape(call, features[:, :1, :1])
    return len(statistics.recorded)


def _windows(size: int, tile: int, margin: int) -> list[tuple[int, int, int]]:
    """Return (start of the window, start of its core, start of what it owns) along one side.

    Windows are all of one length and lie within the image: at its edges there is padding, as in the
    whole. Cores cover the image; the last may overlap the one before, which owns the overlap.
    """
    if tile >= size:
        return [(0, 0, 0)]
    core = tile - 2 * margin
    owned = np.arange(0, size, core)
    cores = owned.clip(max=size - core)
    starts = (cores - margin).clip(0, size - tile)
    return [(int(s), int(c), int(o)) for s, c, o in zip(starts, cores, owned, strict=True)]


def _cut(x: Float[Array, "B h w c"], start: Int[Array, "2"], shape: tuple[int, ...]) -> Array:
    sizes = (x.shape[0], *shape, x.shape[-1])
    return jax.lax.dynamic_slice(x, (0, start[0], start[1], 0), sizes)


def _owned(
    window: Int[Array, "3 2"], shape: tuple[int, ...], core: tuple[int, ...]
) -> Float[Array, "h w"]:
    """Return 1 where a window's pixel is its own in the partition of the image, else 0."""
    masks = []
    for side, (length, owned) in enumerate(zip(shape, core, strict=True)):
        place = window[0, side] + jnp.arange(length, dtype=jnp.int32)
        masks.append((place >= window[2, side]) & (place < window[2, side] + owned))
    return (masks[0][:, None] & masks[1][None, :]).astype(jnp.float32)


def _pooled(
    counts: Float[Array, " tiles"], means: Float[Array, "tiles B g"], variances: Array
) -> tuple[Float[Array, "B g"], Float[Array, "B g"]]:
    """Return mean and variance of all pixels from those of the tiles."""
    shares = (counts / counts.sum())[:, None, None]
    mean = (shares * means).sum(axis=0)
    return mean, (shares * (variances + (means - mean[None]) ** 2)).sum(axis=0)
