"""Where rewards, prompt lists and embedded checkpoints lie: in a checkout, or inside the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffusion_grpo.errors import UsageError, suggest

ResourceKind = Literal["assets", "rewards", "prompts"]

_PACKAGE = Path(__file__).resolve().parent


def resource_path(kind: ResourceKind, *parts: str) -> Path:
    """Return the path of a piece of content that comes with the project.

    A checkout uses its top-level folder in place; an installed wheel uses the copy that it
    carries inside the package. The path need not exist.

    Args:
        kind: the top-level folder.
        *parts: path components below it; none gives the folder itself.

    Returns:
        The path, absolute.
    """
    checkout = _PACKAGE.parent
    in_checkout = (checkout / "pyproject.toml").is_file() and (checkout / kind).is_dir()
    root = checkout / kind if in_checkout else _PACKAGE / "_resources" / kind
    return root.joinpath(*parts)


def resolve_checkpoint(name_or_path: str | Path) -> Path | str:
    """Find a checkpoint: a directory, else a folder under `assets/`, else a hub id.

    Args:
        name_or_path: a directory, the name of an embedded checkpoint (`shapes-diffusion`), or a
            hub id (`owner/name`).

    Returns:
        The directory as a `Path`, or the hub id as it was given.

    Raises:
        UsageError: the name is empty, or can be neither a directory, nor an embedded checkpoint,
            nor a hub id.
    """
    name = str(name_or_path)
    if not name.strip():
        raise UsageError(
            "the checkpoint's name is empty; give a directory, the name of an embedded "
            "checkpoint or a hub id such as 'owner/name'"
        )
    directory = Path(name).expanduser()
    if directory.is_dir():
        return directory
    assets = resource_path("assets")
    is_plain_name = directory.name == name and name not in (".", "..")
    if is_plain_name and (assets / name).is_dir():
        return assets / name
    if _looks_like_hub_id(name):
        return name
    embedded = embedded_checkpoints()
    raise UsageError(
        f"checkpoint {name!r}: no such directory{suggest(name, embedded)}; expected a directory "
        "in the Diffusers layout, an embedded checkpoint "
        f"({', '.join(embedded) or 'none found'}), or a hub id such as 'owner/name'"
    )


def embedded_checkpoints() -> list[str]:
    """Return the names of the checkpoints under `assets/`, sorted."""
    assets = resource_path("assets")
    if not assets.is_dir():
        return []
    markers = ("model_index.json", "config.json")
    return sorted(
        entry.name
        for entry in assets.iterdir()
        if entry.is_dir() and any((entry / marker).is_file() for marker in markers)
    )


def _looks_like_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/name` and no sign of a path."""
    owner, slash, rest = name.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and owner[0] not in ".~"
