"""How a checkpoint is meant to be sampled: a small file beside its `model_index.json`.

Diffusers reads only the files that `model_index.json` names, so the file does not disturb it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.fields import Section, update_section

FILE = "diffusion_grpo.json"

SAMPLERS = ("ddim", "ddpm", "dpm++", "euler")


@dataclasses.dataclass(frozen=True)
class SamplingDefaults(Section):
    """What to sample a checkpoint with where nothing else is asked for.

    The values here are those for a checkpoint that says nothing.
    """

    section_name: ClassVar[str] = "sampling"

    guidance_scale: float = 5.0
    """s, classifier-free guidance; 1 or less switches it off."""
    num_steps: int = 50
    """T, denoising steps of deterministic DDIM."""
    clip_skip: int = 0
    """Layers of the text encoders to skip for the prompts, as Diffusers counts them."""
    negative_prompt: str = ""
    """Text of the unconditional half of the guidance."""
    height: int | None = None
    """In pixels; None is the checkpoint's."""
    width: int | None = None
    """In pixels; None is the checkpoint's."""

    def __post_init__(self) -> None:
        """Reject values that nothing can be sampled with."""
        super().__post_init__()
        self.require_non_negative("guidance_scale", "clip_skip")
        self.require_positive("num_steps")
        for name in ("height", "width"):
            self.require(
                (getattr(self, name) or 1) > 0, name, "a positive number of pixels, or None"
            )

    def settings(self) -> dict[str, Any]:
        """Return the fields that say something: arguments of `pipeline.generate`."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value not in (None, "")}


def check_sampler(sampler: str, eta: float) -> None:
    """Raise a `UsageError` for a sampler that does not exist, or an η that it does not take."""
    if sampler not in SAMPLERS:
        raise UsageError(
            f"sampler is {sampler!r}{suggest(sampler, SAMPLERS)}; expected one of "
            f"{', '.join(SAMPLERS)}"
        )
    if eta and sampler != "ddim":
        raise UsageError(f"eta is {eta}, which only the sampler ddim has; {sampler} takes none")


def write_sampling(directory: Path, sampling: SamplingDefaults) -> None:
    """Write the file into a checkpoint's directory: `{"sampling": {field: value}}`."""
    text = json.dumps({"sampling": sampling.settings()}, indent=2)
    (directory / FILE).write_text(text + "\n")


def read_sampling(directory: Path) -> SamplingDefaults | None:
    """Read the file of a checkpoint's directory; None if it has none.

    Raises:
        UsageError: it is not JSON, or has an unknown field or a wrong value.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(
            f"{path} is not valid JSON: {error}; mend it, or delete it to have the defaults"
        ) from None
    fields = values.get("sampling") if isinstance(values, dict) else None
    if not isinstance(fields, dict) or len(values) != 1:
        raise UsageError(f'{path}: expected {{"sampling": {{"guidance_scale": …, …}}}} alone')
    return update_section(SamplingDefaults(), fields, source=str(path))
