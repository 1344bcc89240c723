"""The commands about rewards: `score`, `check-reward`, `serve-reward`."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro

from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import check_output

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_AT_ONCE = 64  # images read and scored at a time

_T = TypeVar("_T")

RewardNames = Annotated[tuple[str, ...], tyro.conf.arg(metavar="REWARD[=WEIGHT] ...")]
RewardOptions = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME.OPTION=VALUE ...")]


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """Score images that are there already, without any diffusion model."""

    reward: RewardNames
    """Rewards with their weights, as for train."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR|FILE ...")]
    """Image files, or folders of them (not of folders in them), in the order of their names."""
    prompts: str | None = None
    """Prompt list: one prompt an image, or one for each --group-size images, or one for all; a
    .jsonl line may name its image under "image" instead: by its path, or as much of the path's end
    as tells it from the others. None scores with empty prompts."""
    options: RewardOptions = ()
    """Options of the rewards."""
    output: Path = Path("scores.jsonl")
    """Where to: .jsonl or .csv."""
    group_size: int = 1
    """Images of each prompt, side by side; 2 or more for rewards that compare them."""
    combine: str = "weighted"
    """How the total comes of several rewards: weighted, min or ensemble."""
    pessimism: float = 1.0
    """κ of the ensemble."""


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """Find out whether a reward keeps the contract, on images made for that or on your own."""

    reward: Annotated[str, tyro.conf.Positional]
    """A built-in name, my_file.py[:function], package.module:function or a server's URL."""
    options: RewardOptions = ()
    """Options of the reward."""
    prompts: str | None = None
    """Prompt list whose first prompts are used; None for two captions of shapes."""
    size: int = 64
    """Width and height of the images made for the purpose."""
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR|FILE ...")] = ()
    """Images of your own instead: 8 or more, all of one size."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """Compute a reward for others: --reward http://HOST:PORT on their side."""

    reward: Annotated[str, tyro.conf.Positional]
    """A built-in name, my_file.py[:function] or package.module:function."""
    options: RewardOptions = ()
    """Options of the reward."""
    host: str = "127.0.0.1"
    """Address to listen on, such as 127.0.0.1 or ::1; other than this machine's own only with a
    token."""
    port: int = 8000
    """Up to 65535; 0 takes any free one."""
    token_variable: str = "REWARD_SERVER_TOKEN"
    """Environment variable with the token that clients have to send."""
    max_megabytes: float = 64.0
    """Largest request."""
    max_images: int = 256
    """Most images of a request."""
    concurrency: int = 1
    """Requests computed at once; above 1 only for a thread-safe reward."""
    waiting: int = 16
    """Further requests that are kept waiting; more are turned away with status 503."""


def score(options: ScoreOptions) -> int:
    """Run `score`; returns the exit code."""
    from diffusion_grpo.reward import RewardSet, parse_reward_specs
    from diffusion_grpo.reward_scores import Combination
    from diffusion_grpo.reward_specs import convert_option

    if options.group_size < 1:
        raise UsageError(f"group_size is {options.group_size}; expected 1 or more")
    convert_option("--combine", options.combine, Combination)
    output = check_output(options.output, (".jsonl", ".csv"))
    files = find_images(options.images)
    texts, metadata = prompts_of(files, options.prompts, options.group_size)
    batches = plan_batches(files, options.group_size)
    rewards = RewardSet.load(
        parse_reward_specs(options.reward, options.options),
        combination=options.combine,  # pyright: ignore[reportArgumentType]  checked above
        pessimism=options.pessimism,
    )
    rewards.check(texts, metadata, group_size=options.group_size, what="--group-size")
    group_size = options.group_size if options.group_size > 1 else None
    names = [reward.name for reward in rewards.rewards]
    scores = {name: np.zeros(len(files), np.float32) for name in (*names, "total")}
    done = 0
    for rows in batches:
        images = read_images([files[i] for i in rows])
        result = rewards(
            images, [texts[i] for i in rows], [metadata[i] for i in rows], group_size=group_size
        )
        for name, values in (result.scores | {"total": result.total}).items():
            scores[name][rows] = values
        done += len(rows)
        print(f"{done}/{len(files)} images", file=sys.stderr)
    rows = [
        {"image": str(file), "prompt": text}
        | {name: float(values[i]) for name, values in scores.items()}
        for i, (file, text) in enumerate(zip(files, texts, strict=True))
    ]
    for name, values in scores.items():
        print(
            f"{name}: mean {values.mean():.4f}, std {values.std():.4f}, "
            f"from {values.min():.4f} to {values.max():.4f}"
        )
        if group_size is not None:
            print(f"  {_spread(values, group_size)}")
    _write(output, rows)
    print(output)
    return 0


def _spread(values: np.ndarray, group_size: int) -> str:
    """Say how much of the scores' variance is within the prompts, which is what GRPO learns from.

    The variance of all scores is the mean of the prompts' variances plus the variance of their
    means (all of them population variances).

    Args:
        values: float32 [P·G], group by group.
        group_size: G.
    """
    groups = values.reshape(-1, group_size).astype(np.float64)
    within, between = groups.var(axis=1).mean(), groups.mean(axis=1).var()
    total = within + between
    share = f"{within / total:.0%} of the variance" if total else "no variance at all"
    equal = int((np.ptp(groups, axis=1) == 0).sum())
    return (
        f"within a prompt: std {np.sqrt(within):.4f}, {share}; "
        f"{equal} of {len(groups)} prompts have equal scores"
    )


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def find_images(given: Sequence[str]) -> list[Path]:
    """List image files, those of a folder by name, where 2.png comes before 10.png.

    Raises:
        UsageError: a path that is not there or no image, or no image at all.
    """
    files: list[Path] = []
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = [f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES]
            if not inside:
                raise UsageError(
                    f"images {name!r}: no {', '.join(IMAGE_SUFFIXES)} file in this folder"
                )
            files += sorted(inside, key=_natural)
        elif not path.is_file():
            raise UsageError(f"images {name!r}: no such file or folder")
        else:
            files.append(path)
    if not files:
        raise UsageError("no image given; expected files or folders after --images")
    return files


def _natural(file: Path) -> tuple[Any, ...]:
    """Return what sorts names by the numbers in them."""
    parts = [part for part in re.split(r"(\d+)", file.name) if part]
    return (*((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts), (2, 0, file.name))


def prompts_of(
    files: Sequence[Path], name: str | None, group_size: int
) -> tuple[list[str], list[dict[str, Any]]]:
    """Return each image's prompt and metadata.

    Raises:
        UsageError: prompts that do not correspond to the images.
    """
    from diffusion_grpo.prompt_files import prompts_by_image
    from diffusion_grpo.prompts import load_prompts

    count = len(files)
    if count % group_size:
        raise UsageError(
            f"{count} images are no whole number of groups of {group_size}; change --group-size"
        )
    if name is None:
        print("no --prompts: images are scored with empty prompts", file=sys.stderr)
        return [""] * count, [{}] * count
    prompts = load_prompts(name)
    named = sum("image" in prompt.metadata for prompt in prompts)
    if 0 < named < len(prompts):
        raise UsageError(
            f"prompts {name!r}: {named} of {len(prompts)} name their image; expected all or none"
        )
    if named:
        chosen = prompts_by_image(files, prompts, where=f"prompts {name!r}")
    else:
        each = {count: 1, count // group_size: group_size, 1: count}.get(len(prompts))
        if each is None:
            groups = f", {count // group_size} (one a group)" if group_size > 1 else ""
            raise UsageError(
                f"prompts {name!r} has {len(prompts)} prompts for {count} images; expected "
                f"{count} (one an image){groups} or 1"
            )
        chosen = [prompt for prompt in prompts for _ in range(each)]
    texts = [prompt.text for prompt in chosen]
    for start in range(0, count, group_size):
        first, *others = texts[start : start + group_size]
        for place, text in enumerate(others, start + 1):
            if text != first:
                raise UsageError(
                    f"--group-size is {group_size}, but {files[start]} and {files[place]} have the "
                    f"prompts {first!r} and {text!r}; expected one prompt a group: order the "
                    "images by prompt, or leave --group-size out"
                )
    return texts, [prompt.metadata for prompt in chosen]


def plan_batches(files: Sequence[Path], group_size: int) -> list[list[int]]:
    """Return the numbers of images that are read and scored together.

    Those of a batch are of one size, and no group is cut.

    Raises:
        UsageError: a file is not an image, or a group has images of several sizes.
    """
    by_size: dict[tuple[int, int], list[int]] = {}
    for start in range(0, len(files), group_size):
        group = range(start, start + group_size)
        sizes = {_open(files[i], lambda image: image.size) for i in group}
        if len(sizes) > 1:
            raise UsageError(
                f"images {files[group[0]]} to {files[group[-1]]} are a group, but not of one size; "
                "expected the images of a group to be alike"
            )
        by_size.setdefault(sizes.pop(), []).extend(group)
    at_once = max(_AT_ONCE // group_size, 1) * group_size
    return [
        rows[start : start + at_once]
        for rows in by_size.values()
        for start in range(0, len(rows), at_once)
    ]


def read_images(files: Sequence[Path]) -> np.ndarray:
    """Read image files of one size as uint8 [N, H, W, 3].

    Raises:
        UsageError: one is not an image.
    """
    return np.stack([_open(file, lambda image: np.asarray(image.convert("RGB"))) for file in files])


def _open(path: Path, use: Callable[[Any], _T]) -> _T:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"image {path} cannot be read: {error}") from None


def check(options: CheckOptions) -> int:
    """Run `check-reward`; returns the exit code, 1 if the contract is broken."""
    from diffusion_grpo.prompts import load_prompts
    from diffusion_grpo.reward_check import GROUP_SIZE, check_reward, sample_images

    reward = _load(options.reward, options.options)
    if options.images:
        files = find_images(options.images)
        files = files[: len(files) // GROUP_SIZE * GROUP_SIZE]
        sizes = {_open(file, lambda image: image.size) for file in files}
        if len(files) < 2 * GROUP_SIZE or len(sizes) > 1:
            raise UsageError(
                f"--images has {len(files)} images of {len(sizes)} sizes; expected "
                f"{2 * GROUP_SIZE} or more, all of one size"
            )
        images = read_images(files)
    else:
        if options.size < 8:
            raise UsageError(f"--size is {options.size}; expected 8 or more")
        images = sample_images(2 * GROUP_SIZE, options.size)
    texts, metadata = ["a red circle", "a blue square"], [{}, {}]
    if options.prompts is not None:
        prompts = load_prompts(options.prompts)
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    groups = [i % len(texts) for i in range(len(images) // GROUP_SIZE)]
    rows = [i for i in groups for _ in range(GROUP_SIZE)]
    where = "on the device" if reward.on_device else "on the host"
    kind = "of a group" if reward.of_group else "of single images"
    size = f", at most {reward.batch_size} at once" if reward.batch_size else ""
    print(f"reward {reward.name}: {kind}, {where}{size}")
    failed = False
    for finding in check_reward(
        reward, images, [texts[i] for i in rows], [metadata[i] for i in rows]
    ):
        print(f"  {finding.verdict:<5} {finding.text}", flush=True)
        failed |= finding.verdict == "fail"
    print("the contract is broken" if failed else "the contract is kept")
    return int(failed)


def serve(options: ServeOptions, ready: Callable[[int], None] | None = None) -> int:
    """Run `serve-reward` until it is interrupted; returns the exit code.

    Args:
        options: what to serve, and how.
        ready: called with the port once it is open.
    """
    from diffusion_grpo.reward_protocol import Limits
    from diffusion_grpo.reward_server import RewardService
    from diffusion_grpo.reward_server import serve as run

    token = os.environ.get(options.token_variable, "")
    if not token and options.host not in ("127.0.0.1", "::1", "localhost"):
        raise UsageError(
            f"--host {options.host} lets others in, and there is no token: set "
            f"{options.token_variable} in the environment, here and where the run is"
        )
    bounds = {"max_megabytes": 0.001, "max_images": 1, "concurrency": 1, "waiting": 0}
    for name, least in bounds.items():
        if not least <= getattr(options, name) < math.inf:
            raise UsageError(f"{name} is {getattr(options, name)}; expected {least} or more")
    if not 0 <= options.port <= 65535:
        raise UsageError(f"port is {options.port}; expected 0 to 65535")
    reward = _load(options.reward, options.options)
    service = RewardService(
        reward,
        token=token,
        limits=Limits(bytes=int(options.max_megabytes * 2**20), images=options.max_images),
        concurrency=options.concurrency,
        waiting=options.waiting,
    )

    def announce(port: int) -> None:
        asked = f"token of {options.token_variable}" if token else "no token"
        address = f"[{options.host}]" if ":" in options.host else options.host
        print(f"serving reward {reward.name} at http://{address}:{port} ({asked})", flush=True)
        if ready is not None:
            ready(port)

    run(service, options.host, options.port, ready=announce)
    return 0


def _load(reward: str, options: Sequence[str]) -> Any:
    """Load one reward with its options."""
    from diffusion_grpo.reward import load_reward, parse_reward_specs

    (spec,) = parse_reward_specs([reward], options)
    return load_reward(spec.spec, spec.options)
