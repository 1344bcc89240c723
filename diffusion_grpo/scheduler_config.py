"""What a checkpoint's `scheduler_config.json` says, and its table of ᾱ. NumPy only, no JAX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float64, Int

from diffusion_grpo.errors import UsageError, suggest

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
TimestepSpacing = Literal["leading", "trailing", "linspace"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "beta_schedule": get_args(BetaSchedule),
    "prediction_type": get_args(PredictionType),
    "timestep_spacing": get_args(TimestepSpacing),
}

# Samplers for models trained on the discrete DDPM noise schedule. Flow-matching, EDM and distilled
# (LCM, TCD) checkpoints are absent: DDIM steps would give pictures of the wrong model.
_COMPATIBLE_CLASSES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)

# Their default is to clip x̂₀; Heun's is not to, and the other classes have no such option.
_CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler")

# Their default β are those of Stable Diffusion; the other classes' are DDIM's.
_NARROW_CLASSES = (
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
)

# What a pipeline's class sets in its scheduler as it is built, whatever the file says, because the
# first files of Stable Diffusion lacked it. Of the pipelines whose networks are supported, SDXL's
# and all others that are not named here set nothing.
_OFFSET = {"steps_offset": 1}
_OFFSET_UNCLIPPED = _OFFSET | {"clip_sample": False}
PIPELINE_CORRECTIONS: Mapping[str, Mapping[str, Any]] = {
    "CycleDiffusionPipeline": _OFFSET,
    "LEditsPPPipelineStableDiffusion": _OFFSET_UNCLIPPED,
    "StableDiffusionDiffEditPipeline": _OFFSET,
    "StableDiffusionImg2ImgPipeline": _OFFSET_UNCLIPPED,
    "StableDiffusionInpaintPipeline": _OFFSET,
    "StableDiffusionInpaintPipelineLegacy": _OFFSET_UNCLIPPED,
    "StableDiffusionPAGImg2ImgPipeline": _OFFSET_UNCLIPPED,
    "StableDiffusionPAGInpaintPipeline": _OFFSET_UNCLIPPED,
    "StableDiffusionPAGPipeline": _OFFSET_UNCLIPPED,
    "StableDiffusionPipeline": _OFFSET_UNCLIPPED,
    "StableDiffusionPipelineSafe": _OFFSET_UNCLIPPED,
}

# Fields that Diffusers' DDPM, Euler and multistep DPM-Solver read; DDIM never does.
SOLVER_FIELDS = frozenset(
    "algorithm_type euler_at_final final_sigmas_type interpolation_type lambda_min_clipped "
    "lower_order_final solver_order solver_type use_beta_sigmas use_exponential_sigmas "
    "use_karras_sigmas use_lu_lambdas variance_type".split()
)

# Fields that steer another class' solver, or an option that is off: no sampler of ours reads them.
_HARMLESS_FIELDS = frozenset(
    "disable_corrector dynamic_thresholding_ratio flow_shift predict_x0 sample_max_value "
    "skip_prk_steps solver_p tensor_format time_shift_type".split()
)

# Fields that change what the model means, with the values under which they do not.
_GUARDED_FIELDS: dict[str, tuple[Any, ...]] = {
    "predict_epsilon": (True, None),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "timestep_type": ("discrete",),
    "use_dynamic_shifting": (False, None),
    "use_flow_sigmas": (False, None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


@dataclass(frozen=True)
class SchedulerConfig:
    """The noise schedule a checkpoint was trained with, in Diffusers' `DDIMScheduler` fields.

    Args:
        num_train_timesteps: timesteps of the forward process.
        beta_start: first β.
        beta_end: last β.
        beta_schedule: how β runs from one to the other.
        trained_betas: the β themselves, in place of the three fields above.
        clip_sample: clip x̂₀ to ±`clip_sample_range` in every step (models on pixels).
        set_alpha_to_one: the last step ends at ᾱ = 1 rather than at ᾱ₀.
        steps_offset: added to every timestep of the `leading` spacing.
        prediction_type: what the model's output is: ε, v or x₀.
        thresholding: dynamic thresholding; unsupported, must be false.
        clip_sample_range: see `clip_sample`.
        timestep_spacing: which T of the timesteps are visited by DDIM and DDPM steps, and in
            training.
        rescale_betas_zero_snr: rescale so that the last ᾱ is exactly 0 (Lin et al. 2023, alg. 1).
        default_spacing: the file names no spacing: `timestep_spacing` is `leading`, and other
            samplers have a default of their own, see `solver_spacing`. Not part of equality, which
            is that of the noise schedule and of DDIM steps.
        solver_options: the file's fields among `SOLVER_FIELDS`, with the values that it has. Only
            the samplers `ddpm`, `euler` and `dpm++` read them. Not part of equality either.

    Raises:
        UsageError: a value is outside its range or not among its choices.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: PredictionType = "epsilon"
    thresholding: bool = False
    clip_sample_range: float = 1.0
    timestep_spacing: TimestepSpacing = "leading"
    rescale_betas_zero_snr: bool = False
    default_spacing: bool = field(default=False, compare=False)
    solver_options: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Reject what has no meaning, before anything is computed from it."""
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if self.thresholding:
            raise UsageError(
                "Scheduler option thresholding=True is not supported: dynamic thresholding is "
                "meant for models on pixels. Set it to false in scheduler_config.json."
            )
        if self.default_spacing and self.timestep_spacing != "leading":
            raise UsageError(
                f"timestep_spacing is {self.timestep_spacing!r} and default_spacing is True; "
                "expected default_spacing=False where a spacing is chosen."
            )
        if self.num_train_timesteps < 1:
            raise UsageError(
                f"num_train_timesteps is {self.num_train_timesteps}; expected at least 1."
            )
        if self.steps_offset < 0:
            raise UsageError(f"steps_offset is {self.steps_offset}; expected 0 or more.")
        if self.clip_sample and not self.clip_sample_range > 0:
            raise UsageError(f"clip_sample_range is {self.clip_sample_range}; expected > 0.")
        if self.trained_betas is None:
            if not 0 < self.beta_start <= self.beta_end < 1:
                raise UsageError(
                    f"beta_start is {self.beta_start} and beta_end {self.beta_end}; expected "
                    "0 < beta_start <= beta_end < 1."
                )
        elif len(self.trained_betas) != self.num_train_timesteps:
            raise UsageError(
                f"trained_betas has {len(self.trained_betas)} entries; expected "
                f"num_train_timesteps = {self.num_train_timesteps}."
            )
        elif not all(0 < beta <= 1 for beta in self.trained_betas):
            raise UsageError("trained_betas has an entry outside (0, 1].")
        for name in self.solver_options:
            if name not in SOLVER_FIELDS:
                raise UsageError(
                    f"solver_options has {name!r}{suggest(name, sorted(SOLVER_FIELDS))}; expected "
                    f"some of {', '.join(sorted(SOLVER_FIELDS))}."
                )

    @property
    def solver_spacing(self) -> TimestepSpacing:
        """The spacing of Euler and DPM-Solver steps: `linspace`, their default, if none is named.

        Diffusers fills in the default of the class that it converts to, not of the file's class.
        """
        return "linspace" if self.default_spacing else self.timestep_spacing

    @property
    def use_karras_sigmas(self) -> bool:
        """Whether Euler and DPM-Solver steps have the noise levels of Karras et al. 2022, eq. 5."""
        return self.solver_options.get("use_karras_sigmas") is True

    @classmethod
    def from_dict(
        cls, config: Mapping[str, Any], *, pipeline: str | None = None
    ) -> SchedulerConfig:
        """Read any Diffusers `scheduler_config.json` for sampling by DDIM steps.

        What describes the model, β and `clip_sample`, has the default of the class that wrote the
        file, where the file lacks it: a class without `clip_sample` does not clip. All other fields
        have the default of `DDIMScheduler`, as in its `from_config`. Fields that steer the solvers
        `euler` and `dpm++` are kept for them, unread; those of other solvers are ignored by name.

        Last come the values that the pipeline's class sets in its scheduler as it is built: for
        Stable Diffusion 1 and 2 `steps_offset` is 1 and nothing is clipped, as with
        `StableDiffusionPipeline.from_pretrained(…, scheduler=DDIMScheduler.from_pretrained(…))`.

        Args:
            config: the parsed JSON object.
            pipeline: the class that `model_index.json` names; None reads the file alone.

        Returns:
            The configuration.

        Raises:
            UsageError: the class is not a DDPM-type sampler, a field is unknown, a value unusable.
        """
        class_name = config.get("_class_name", "DDIMScheduler")
        if class_name not in _COMPATIBLE_CLASSES:
            raise UsageError(
                f"Scheduler class {class_name!r} cannot be sampled by DDIM steps; expected one of "
                f"{', '.join(_COMPATIBLE_CLASSES)}{suggest(str(class_name), _COMPATIBLE_CLASSES)}."
            )
        ours = ("default_spacing", "solver_options")  # no fields of a file
        fields = [name for name in cls.__dataclass_fields__ if name not in ours]
        values: dict[str, Any] = {"clip_sample": class_name in _CLIPPING_CLASSES}
        if class_name in _NARROW_CLASSES:
            values |= {"beta_start": 0.00085, "beta_end": 0.012}
        for name, value in config.items():
            if name in fields:
                values[name] = _parse(name, value)
            elif name in _GUARDED_FIELDS:
                _check_choice(name, value, _GUARDED_FIELDS[name])
            elif name not in SOLVER_FIELDS | _HARMLESS_FIELDS and not name.startswith("_"):
                known = (*fields, *_GUARDED_FIELDS, *sorted(SOLVER_FIELDS | _HARMLESS_FIELDS))
                raise UsageError(
                    f"Unknown field {name!r} (value {value!r}) in the scheduler config of class "
                    f"{class_name}{suggest(name, known)}. Its meaning for sampling is not known; "
                    "remove it if it has none."
                )
        values |= PIPELINE_CORRECTIONS.get(pipeline or "", {})
        return cls(
            **values,
            default_spacing="timestep_spacing" not in config,
            solver_options={name: config[name] for name in config if name in SOLVER_FIELDS},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that Diffusers reads as a `DDIMScheduler`, or converts."""
        fields = asdict(self)
        options = fields.pop("solver_options")
        if fields.pop("default_spacing"):
            del fields["timestep_spacing"]
        return {"_class_name": "DDIMScheduler", **fields, **options}


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    # `type` too, because True == 1 and JSON tells them apart.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise UsageError(
            f"Scheduler option {name} is {value!r}; expected one of "
            f"{', '.join(repr(choice) for choice in choices)}"
            f"{suggest(str(value), [str(choice) for choice in choices])}."
        )


def _parse(name: str, value: Any) -> Any:
    """Convert one JSON value to its field's type."""
    if name in _CHOICES:
        _check_choice(name, value, _CHOICES[name])
    if name == "trained_betas":
        if value is None:
            return None
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise UsageError(f"Scheduler option trained_betas is {value!r}; expected a list.")
        return tuple(float(beta) for beta in value)
    default = SchedulerConfig.__dataclass_fields__[name].default
    kinds: tuple[type, ...] = (int, float) if type(default) is float else (type(default),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and type(default) is not bool):
        raise UsageError(
            f"Scheduler option {name} is {value!r}; expected a value of type "
            f"{type(default).__name__}."
        )
    return type(default)(value)


def alphas_cumprod(config: SchedulerConfig) -> Float64[np.ndarray, " num_train_timesteps"]:
    """Return ᾱ_t = Π_{u≤t} (1 − β_u), the table that the checkpoint was trained with.

    Diffusers builds the table in float32, and near t = 0, and near zero terminal SNR, its rounding
    shows in 1 − ᾱ at 1e-5. So that the steps are those of the trained model, this rounds to float32
    where Diffusers does and nowhere else.

    Args:
        config: the noise schedule.

    Returns:
        ᾱ [num_train_timesteps], decreasing, float32 values in a float64 array.
    """
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas, np.float32)
    elif config.beta_schedule == "linear":
        betas = _linspace(config.beta_start, config.beta_end, count)
    elif config.beta_schedule == "scaled_linear":
        betas = _linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    else:  # squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17
        times = np.arange(count + 1) / count
        alpha_bar = np.cos((times + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999).astype(np.float32)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(_cumprod(1 - betas))
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        squared = root**2
        betas = 1 - np.concatenate([squared[:1], squared[1:] / squared[:-1]])
    return _cumprod(1 - betas).astype(np.float64)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Interpolate with a step rounded to float32, from both ends, as the float32 table has it.

    A last-bit difference in β grows to 1e-4 in 1 − ᾱ once the table is rescaled to zero SNR.
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    upward = np.float64(first) + step * index
    downward = np.float64(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), upward, downward).astype(np.float32)


def _cumprod(values: np.ndarray) -> np.ndarray:
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def spaced_timesteps(config: SchedulerConfig, num_steps: int) -> Int[np.ndarray, " T"]:
    """Return the T timesteps visited, from noise to picture, as Diffusers spaces them.

    Args:
        config: the noise schedule.
        num_steps: T, 1 to `num_train_timesteps`.

    Returns:
        int64 [T], decreasing.

    Raises:
        UsageError: T is out of range, or `steps_offset` carries a timestep past the last.
    """
    total = config.num_train_timesteps
    if not 1 <= num_steps <= total:
        raise UsageError(
            f"The number of denoising steps is {num_steps}; expected 1 to num_train_timesteps = "
            f"{total}."
        )
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, num_steps).round()[::-1].astype(np.int64)
    elif config.timestep_spacing == "leading":
        timesteps = np.arange(num_steps)[::-1] * (total // num_steps) + config.steps_offset
    else:
        # For some T, rounding in arange yields one entry too many, a timestep of −1: cut it off.
        timesteps = np.arange(total, 0, -total / num_steps)[:num_steps].round().astype(np.int64) - 1
    if timesteps[0] >= total:
        raise UsageError(
            f"With {num_steps} steps and steps_offset = {config.steps_offset} the first timestep "
            f"is {timesteps[0]}, past the last of {total}. Use fewer steps or timestep_spacing "
            "'trailing'."
        )
    return timesteps
