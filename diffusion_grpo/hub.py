"""Which files of a hub repository are downloaded, and of which commit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from diffusion_grpo.sampling import FILE as SAMPLING_FILE

Layout = Literal["diffusers", "configs", "transformers", "processor"]

# A pipeline's components with weights → the stem of their files' names.
WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}

_COMMITS: ContextVar[dict[str, str] | None] = ContextVar("_COMMITS", default=None)


@contextlib.contextmanager
def commits_kept(known: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Read hub repositories that are named without a revision at the commits of another time.

    Args:
        known: repository → commit; of others, the main branch's is read.

    Yields:
        `known`, and what is read within of others.
    """
    commits = dict(known)
    token = _COMMITS.set(commits)
    try:
        yield commits
    finally:
        _COMMITS.reset(token)


def kept_commit(repository: str) -> str | None:
    """Return the commit of `commits_kept` that a repository is to be read at; None for its main."""
    commits = _COMMITS.get()
    return None if commits is None else commits.get(repository)


def keep_commit(repository: str, path: Path) -> None:
    """Note which commit of a repository's main branch was read, within `commits_kept`.

    Args:
        repository: `owner/name`.
        path: in the hub's cache, which names folders by the commit.
    """
    commits = _COMMITS.get()
    found = re.search("/snapshots/([0-9a-f]{40})(/|$)", path.as_posix())
    if commits is not None and found:
        commits.setdefault(repository, found[1])


def split_revision(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision`, as the hub's own file system is addressed; None without one."""
    repository, at, revision = name.partition("@")
    return (repository, revision) if at and repository and revision else (name, None)


def hub_patterns(layout: Layout, variant: str | None = None) -> list[str]:
    """Return what is downloaded of a hub repository, as `fnmatch` patterns (`*` crosses a `/`).

    `diffusers` is a pipeline with a folder for each component, `configs` what such a one says of
    its networks, `transformers` one model, `processor` what goes with a model without its weights.

    Weights are named in full, so that other variants (`.fp16.`, `.non_ema.`), components that are
    not used and single-file checkpoints stay behind. Of a `variant`, only its files are taken;
    `weight_patterns` names what a component that lacks it is read from instead.
    """
    configs = ["config.json", "preprocessor_config.json"]
    tokenizer = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ]
    if layout == "processor":
        return [*configs, *tokenizer]
    if layout == "transformers":
        return [*configs, *tokenizer, *_weights("model", variant)]
    networks = [
        "model_index.json",
        *(f"{part}/config.json" for part in WEIGHTS),
        "scheduler/scheduler_config.json",
    ]
    if layout == "configs":
        return networks
    return [
        *networks,
        SAMPLING_FILE,
        *(f"{part}/{name}" for part in ("tokenizer", "tokenizer_2") for name in tokenizer),
        *weight_patterns(WEIGHTS, variant),
    ]


def weight_patterns(parts: Iterable[str], variant: str | None = None) -> list[str]:
    """Return the weights of some of a pipeline's components, as `hub_patterns` does."""
    return [pattern for part in parts for pattern in _weights(f"{part}/{WEIGHTS[part]}", variant)]


def _weights(stem: str, variant: str | None) -> list[str]:
    infix = f".{variant}" if variant else ""
    return [
        f"{stem}{infix}.safetensors",
        f"{stem}{infix}-?????-of-?????.safetensors",
        f"{stem}{infix}.safetensors.index.json",
        *([f"{stem}.safetensors.index.{variant}.json"] if variant else ()),
    ]
