"""Weights that are one file, here or on the hub: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_grpo.errors import UsageError
from diffusion_grpo.hub import keep_commit, kept_commit, split_revision
from diffusion_grpo.torch_file import read_torch_file, tensors_of

TORCH_SUFFIXES = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def is_weights_file(name: str) -> bool:
    """Whether a name ends as a file of weights does."""
    return name.lower().endswith(SUFFIXES)


def weights_file(name: str) -> Path:
    """Find a file of weights.

    Args:
        name: a path, or a hub id with a file after it: `owner/name/file.safetensors`, or
            `owner/name@revision/file.safetensors`.

    Returns:
        A local path; a file of the hub is downloaded once.

    Raises:
        UsageError: there is no such file, or the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    owner, repository, file = [*name.split("/", 2), "", ""][:3]
    if not (owner and repository and file) or owner[0] in ".~" or not is_weights_file(name):
        raise UsageError(
            f"weights {name!r}: no such file; expected a file that ends in "
            f"{', '.join(SUFFIXES)}, or one of the hub as owner/name/file"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        place, revision = split_revision(f"{owner}/{repository}")
        found = Path(hf_hub_download(place, file, revision=revision or kept_commit(place)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"weights {name!r}: not a file here, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); check the name and the "
            "network, or download it first and give its path"
        ) from None
    if revision is None:
        keep_commit(place, found)
    return found


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the tensors of a file by name; nothing in it is executed.

    Raises:
        UsageError: it cannot be read, or holds anything but tensors.
    """
    if path.suffix.lower() in TORCH_SUFFIXES:
        return tensors_of(read_torch_file(path), source=str(path))
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(
            f"{path} is not a readable safetensors file: {error}; copy it again"
        ) from None
