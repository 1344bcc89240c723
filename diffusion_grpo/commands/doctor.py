"""`diffusion-grpo doctor`: is everything here that a run needs, and what to do where it is not.

It knows of the machine alone: of no run, and of no configuration.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from diffusion_grpo.commands.common import parse
from diffusion_grpo.errors import RunError
from diffusion_grpo.installing import DISTRIBUTION, install_command, pip_line

EXTRAS: Mapping[str, str] = {
    "tensorboard": "event files beside metrics.jsonl",
    "wandb": "logging to Weights & Biases",
    "pyarrow": "prompt lists in parquet",
    "rapidocr": "the reward ocr",
    "starlette": "serve-reward",
}
# Writing that prompts may be in, and a package of Debian's and Ubuntu's whose fonts have it.
SCRIPTS: Mapping[str, tuple[str, str]] = {
    "accented Latin": ("éñüł", "fonts-dejavu-core"),
    "Greek": ("Ωλ", "fonts-dejavu-core"),
    "Cyrillic": ("Жя", "fonts-dejavu-core"),
    "Arabic": ("عش", "fonts-dejavu-core"),
    "Chinese": ("漢汉", "fonts-noto-cjk"),
    "Japanese": ("かナ", "fonts-noto-cjk"),
    "Korean": ("한글", "fonts-noto-cjk"),
}
_ROOMY = 2 * 2**30  # bytes of disk below which a checkpoint of any size may fail
_SIGN = {"ok": " ", "note": "-", "wrong": "!"}


@dataclasses.dataclass(frozen=True)
class DoctorOptions:
    """Print versions, devices, memory, cache, hub access and fonts, and what is wrong with each."""

    output: Path = Path()
    """The folder that runs are to be written to, whose disk is looked at."""
    timeout: float = 5.0
    """Seconds that the model hub has to answer."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        thing: that was looked at.
        found: in words.
        status: `ok`; `note`, which limits something; or `wrong`, which no run gets past.
        mend: what to do; empty where all is well.
    """

    thing: str
    found: str
    status: Literal["ok", "note", "wrong"] = "ok"
    mend: str = ""

    def __str__(self) -> str:
        """Return one line, or two with the mend."""
        line = f"{_SIGN[self.status]} {self.thing:<12} {self.found}"
        return f"{line}\n{'':15}{self.mend}" if self.mend else line


def run(words: Sequence[str]) -> list[Path]:
    """Print the findings as they are made.

    Raises:
        RunError: something is wrong.
    """
    options = parse(DoctorOptions, words, "diffusion-grpo doctor")
    wrong = 0
    for finding in examine(options.output, options.timeout):
        print(finding, flush=True)
        wrong += finding.status == "wrong"
    if wrong:
        raise RunError(f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong, marked by !")
    return []


def examine(output: Path = Path(), timeout: float = 5.0) -> Iterator[Finding]:
    """Yield a finding of everything that a run needs, quick ones first."""
    yield Finding("python", f"{platform.python_version()}, {sys.executable}")
    yield from packages()
    yield from devices()
    yield memory()
    yield from disk(output)
    yield compilation_cache()
    yield hub(timeout)
    yield fonts()
    yield embedded()
    yield extras()


def packages(version: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """Compare each package that the project needs with the version that it asks for.

    Args:
        version: name → installed version, or `PackageNotFoundError`.
    """
    from packaging.requirements import Requirement

    asked = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    asked = [r for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    found: list[str] = []
    for requirement in asked:
        mend = pip_line([requirement])
        try:
            has = version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("packages", f"{requirement} is not installed", "wrong", mend)
            continue
        if not requirement.specifier.contains(has, prereleases=True):
            yield Finding("packages", f"{requirement} is asked for, {has} is here", "wrong", mend)
        found.append(f"{requirement.name} {has}")
    yield Finding("packages", ", ".join(found))


def devices() -> Iterator[Finding]:
    """List JAX's devices, and compute something on them."""
    try:
        import jax
        import jax.numpy as jnp

        # A device that is listed may still refuse to compute: a driver too old, memory all taken.
        float(jnp.ones((8, 8)).sum())
        found = jax.devices()
    except Exception as error:  # noqa: BLE001  JAX raises whatever its plugins do; all is a finding
        said = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "reinstall jax and jaxlib of the same version; see `pip check`"
        yield Finding("devices", f"JAX does not run: {said}", "wrong", mend)
        return
    kinds = ", ".join(dict.fromkeys(f"{d.platform} ({d.device_kind})" for d in found))
    yield Finding("devices", f"{len(found)} x {kinds}")
    if found[0].platform == "cpu" and Path("/dev/nvidia0").exists():
        yield Finding(
            "devices",
            "an NVIDIA GPU is here, and JAX does not use it",
            "note",
            f"{install_command('cuda')}, and unset JAX_PLATFORMS",
        )
    for device in found:
        stats: Any = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
            yield Finding("devices", f"{device}: {_gib(free)} of {_gib(stats['bytes_limit'])} free")


def memory() -> Finding:
    """Say how much of the machine's memory is free."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (page * os.sysconf(f"SC_{name}_PAGES") for name in ("PHYS", "AVPHYS"))
    except (ValueError, OSError, AttributeError):  # not POSIX
        return Finding("memory", "unknown on this system", "note")
    return Finding("memory", f"{_gib(total)}, {_gib(free)} unused, {os.cpu_count()} CPU cores")


def disk(output: Path) -> Iterator[Finding]:
    """Say how much room the folder of runs and that of temporary files have."""
    for thing, folder in (("output", output), ("temporary", Path(tempfile.gettempdir()))):
        try:
            free = shutil.disk_usage(_existing(folder)).free
        except OSError as error:
            mend = "choose another folder with --output"
            yield Finding(thing, f"{folder}: {error.strerror}", "wrong", mend)
            continue
        problem = _unwritable(folder)
        if problem:
            mend = "choose another folder with --output" if thing == "output" else "set TMPDIR"
            yield Finding(thing, f"{folder.resolve()}: {problem}", "wrong", mend)
        elif free < _ROOMY:
            mend = "a checkpoint of Stable Diffusion 1.5 in float32 takes 4 GB and more"
            yield Finding(thing, f"{folder.resolve()}: {_gib(free)} free", "note", mend)
        else:
            yield Finding(thing, f"{folder.resolve()}: {_gib(free)} free")


def compilation_cache() -> Finding:
    """Look at the folder that compiled programs are kept in."""
    name = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not name:
        mend = "unset JAX_COMPILATION_CACHE_DIR: the user's cache folder is the default"
        return Finding("cache", "compiled programs are not kept", "note", mend)
    folder = Path(name)
    problem = _unwritable(folder)
    if problem:
        mend = "set JAX_COMPILATION_CACHE_DIR to a folder that you can write, to start quickly"
        return Finding("cache", f"{folder}: {problem}", "note", mend)
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    return Finding("cache", f"{folder}: {len(sizes)} files, {_gib(sum(sizes))}")


def hub(timeout: float) -> Finding:
    """Ask the model hub for an answer; a token is named, never shown."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    token = "with a token" if get_token() else "without a token, so no private repositories"
    cache = f"cache {constants.HF_HUB_CACHE}"
    mend = "checkpoints come from directories, or from the cache, until it does"
    if constants.HF_HUB_OFFLINE:
        return Finding("hub", f"switched off by HF_HUB_OFFLINE; {cache}", "note", mend)
    try:
        get_session().get(constants.ENDPOINT, timeout=timeout)
    except Exception as error:  # noqa: BLE001  the HTTP library's own errors, and it may change
        found = f"no answer ({type(error).__name__}), {token}; {cache}"
        return Finding("hub", found, "note", mend)
    return Finding("hub", f"answers, {token}; {cache}")


def fonts() -> Finding:
    """Check that captions can be drawn, and say in which scripts they cannot."""
    from PIL import ImageFont, features

    from diffusion_grpo.fonts import lacking

    if not features.check("freetype2"):
        mend = "reinstall Pillow from a wheel: pip install --force-reinstall pillow"
        return Finding("fonts", "Pillow has no FreeType", "wrong", mend)
    font: Any = ImageFont.load_default(12)
    found = f"{' '.join(font.getname())}, which comes with Pillow"
    missing = {name: package for name, (text, package) in SCRIPTS.items() if lacking(text)}
    if not missing:
        return Finding("fonts", f"{found}, and others of the system")
    needed = " ".join(dict.fromkeys(missing.values()))
    mend = f"install fonts of the system, on Debian and Ubuntu: apt-get install {needed}"
    return Finding("fonts", f"{found}; boxes stand for {', '.join(missing)}", "note", mend)


def embedded() -> Finding:
    """Check that the embedded checkpoints came along."""
    from diffusion_grpo.resources import embedded_checkpoints

    names = list(embedded_checkpoints())
    if names:
        return Finding("checkpoints", ", ".join(names))
    mend = "install the project again, from its checkout or its wheel"
    return Finding("checkpoints", "none of the embedded ones is here", "wrong", mend)


def extras() -> Finding:
    """Say which optional packages are here, and what the others are for."""
    missing = [name for name in EXTRAS if not _installed(name)]
    here = ", ".join(name for name in EXTRAS if name not in missing) or "none"
    lacking = "; ".join(f"{name}: {EXTRAS[name]}" for name in missing)
    return Finding("extras", here + (f" (not here: {lacking})" if lacking else ""))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return next(p for p in (folder, *folder.parents) if p.exists())


def _unwritable(folder: Path) -> str:
    """Return why no file can be written there, or ''."""
    nearest = _existing(folder)
    if not nearest.is_dir():
        return f"{nearest} is a file"
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
