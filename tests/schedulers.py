"""Stable Diffusion's noise, with the sampler that the embedded model has."""

from typing import Any

from diffusion_grpo.schedule import SchedulerConfig


def scheduler(**changed: Any) -> SchedulerConfig:
    """Return v-prediction with trailing timesteps; `changed` are fields."""
    fields: dict[str, Any] = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
    )
    return SchedulerConfig(**fields | changed)
