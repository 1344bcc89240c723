"""Everything that decides a run: its sections, their fit, presets, YAML files and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from diffusion_grpo.consistency import check_consistency
from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.fields import Section, update_section
from diffusion_grpo.learning_sections import GRPOOptions, NFTOptions, OptimConfig
from diffusion_grpo.refusals import refusals
from diffusion_grpo.resources import embedded_checkpoints
from diffusion_grpo.reward_failure import parse_failure_policies
from diffusion_grpo.reward_specs import RewardSpec, names_of_same, parse_reward_specs
from diffusion_grpo.sections import (
    SHORT_FLAGS,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)

__all__ = [
    "PRESETS",
    "Config",
    "EvalConfig",
    "GRPOOptions",
    "MeshConfig",
    "ModelConfig",
    "NFTOptions",
    "OptimConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "describe_preset",
    "from_dict",
    "load_config",
    "to_yaml",
]


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    The defaults are one in the embedded world. `load_config` and `from_dict` leave out what goes
    with a default that is replaced, as the held-out list goes with the training list; here every
    field is taken as it is.
    """

    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig(options=("clip.model=shapes-clip",))
    grpo: GRPOOptions = GRPOOptions()
    nft: NFTOptions = NFTOptions()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig()

    def training_rewards(self) -> list[RewardSpec]:
        """Return the rewards that are trained on, with their weights and options."""
        return parse_reward_specs(
            self.reward.rewards, _options_of(self.reward.rewards, self.reward.options)
        )

    def gold_rewards(self) -> list[RewardSpec]:
        """Return the rewards that only evaluation sees, with their options."""
        gold = self.eval.gold
        return parse_reward_specs(gold, _options_of(gold, self.reward.options)) if gold else []

    def reward_settings(self) -> dict[str, Any]:
        """Return the arguments of `RewardSet.load` beside the rewards.

        Raises:
            UsageError: a failure policy that is malformed or, like a name to cache, not of a reward
                in use.
        """
        specs = parse_reward_specs((*self.reward.rewards, *self.eval.gold), self.reward.options)
        names = [spec.name for spec in specs]
        for name in self.reward.cache:
            if name not in names:
                raise UsageError(
                    f"reward.cache has {name!r}, which is not used{suggest(name, names)}; rewards "
                    f"in use: {', '.join(names)}"
                )
        return {
            "combination": self.reward.combine,
            "pessimism": self.reward.pessimism,
            "policies": parse_failure_policies(self.reward.on_failure, names),
            "cache": self.reward.cache,
            "max_dropped": self.reward.max_dropped,
        }

    def validate(self) -> None:
        """Check that the sections fit each other.

        Raises:
            UsageError: options that do not fit each other (see `check_consistency`); a malformed
                reward, one that is both trained on and gold, or an option or failure policy of
                neither.
        """
        # Together, so that an option of no reward and a reward in both lists are found.
        self.reward_settings()
        if self.prompts.heldout is not None and self.prompts.heldout_share:
            raise UsageError(
                f"prompts.heldout_share is {self.prompts.heldout_share}, but prompts.heldout is "
                f"{self.prompts.heldout!r}; expected one of the two: set prompts.heldout to None"
            )
        check_consistency(self)


def _options_of(rewards: Sequence[str], options: Sequence[str]) -> tuple[str, ...]:
    """Return those `NAME.OPTION=VALUE` whose NAME is one of the rewards."""
    names = {spec.name for spec in parse_reward_specs(rewards)}
    return tuple(option for option in options if _owner(option) in names)


def _owner(option: str) -> str:
    """Return the NAME of `NAME.OPTION=VALUE`."""
    return option.partition("=")[0].rpartition(".")[0].strip()


def demo() -> Config:
    """The embedded shapes model toward the embedded CLIP score: 6 to 12 minutes on two cores.

    `diffusion-grpo train demo`: 200 iterations. Of 360 held-out prompts 43.6 % are drawn right
    before, and 65.6 % after (64.4 to 67.5, three seeds); the CLIP score goes from 0.626 to 0.678
    (docs/learning.md).
    """
    return Config(
        model=ModelConfig(pretrained="shapes-diffusion", trainable="full"),
        rollout=RolloutConfig(
            prompts_per_iteration=8,
            images_per_prompt=16,
            num_steps=10,
            guidance_scale=1.0,
            microbatch=32,
            window_start=1,
            window_size=8,
        ),
        reward=RewardConfig(
            rewards=("clip=1.0",), options=("clip.model=shapes-clip", "shapes.partial_credit=false")
        ),
        grpo=GRPOOptions(
            best_and_worst=4,
            step_weights="gain",
            updates_per_rollout=1,
            microbatch=32,
            beta=0.01,
        ),
        optim=OptimConfig(
            learning_rate=4e-4, schedule="cosine", beta2=0.99, warmup_iterations=4, ema_decay=0.95
        ),
        eval=EvalConfig(num_prompts=360, num_steps=20, gold=("shapes",)),
        run=RunConfig(output="runs/demo", iterations=200),
    )


def demo_gold() -> Config:
    """The embedded model toward the exact judge with partial credit: how far RL takes it.

    `diffusion-grpo train demo-gold`: its iterations are each as long as one of `demo`. 500 of them
    (`--iterations 500`) make 43.6 % right 70.0 % (59, 64, 68, 69, 70 after each hundred; 69.4 to
    70.3 at the end, three seeds), and as many of DiffusionNFT with all of 16 x 8 images and no KL
    72.7 % (63, 68, 71, 72, 73; 71.1 to 73.9; docs/learning.md), in 20 to 40 minutes on one core.
    """
    base = demo()
    return dataclasses.replace(
        base,
        reward=RewardConfig(rewards=("shapes=1.0",)),
        eval=dataclasses.replace(base.eval, gold=("shapes_exact",)),
        run=dataclasses.replace(base.run, output="runs/demo-gold"),
    )


def demo_mix() -> Config:
    """The embedded model toward the CLIP score and the judge, each normalized in its groups.

    `diffusion-grpo train demo-mix`: 200 iterations, each about as long as one of `demo`, make
    43.6 % right 66.9 % (63 after a hundred; 65.3 to 69.7 at the end, three seeds), and the CLIP
    score goes from 0.626 to 0.678. 500 of DiffusionNFT make it 74.4 % and 0.690 (two seeds;
    docs/learning.md).
    """
    base = demo_gold()
    return dataclasses.replace(
        base,
        reward=RewardConfig(rewards=("clip=1.0", "shapes=1.0"), options=demo().reward.options[:1]),
        grpo=dataclasses.replace(base.grpo, combine="advantages"),
        run=dataclasses.replace(base.run, output="runs/demo-mix"),
    )


def sd15() -> Config:
    """Stable Diffusion 1.5 (or another checkpoint), a LoRA adapter in bfloat16, by a CLIP score.

    `diffusion-grpo train sd15`: 200 iterations of 256 images; `diffusion-grpo plan sd15 --device
    NAME` says how long they take on a device (3.3 minutes each on an H100, by the data sheet) and
    how much memory. How many images are drawn and differentiated at a time, and whether activations
    are recomputed, is chosen by the memory there is (`fitting.py`). Images are of the checkpoint's
    own size, so that `--model` may be one of SDXL; its steps are weighted, because one late step of
    20 has three quarters of the sum of squares of a trajectory's log-ratio otherwise. The reward of
    real weights has not been seen to rise here: no hub was at hand. Every 20 iterations two images
    of each held-out prompt tell diversity and KL.
    """
    return Config(
        model=ModelConfig(
            pretrained="stable-diffusion-v1-5/stable-diffusion-v1-5",
            dtype="bfloat16",
            trainable="lora",
            lora_rank=16,
            lora_alpha=16.0,
            gradient_checkpointing=None,
        ),
        prompts=PromptsConfig(train="animals", heldout="animals_heldout"),
        rollout=RolloutConfig(
            prompts_per_iteration=16,
            images_per_prompt=16,
            num_steps=20,
            microbatch=None,
        ),
        reward=RewardConfig(
            rewards=("clip=1.0",), options=("clip.model=openai/clip-vit-base-patch32",)
        ),
        grpo=GRPOOptions(microbatch=None, step_weights="gain"),
        optim=OptimConfig(learning_rate=3e-4),
        eval=EvalConfig(every=20, images_per_prompt=2, stochastic=True),
        run=RunConfig(output="runs/sd15", iterations=200, save_every=20),
    )


_PRESET_FUNCTIONS = {
    "demo": demo,
    "demo-gold": demo_gold,
    "demo-mix": demo_mix,
    "sd15": sd15,
}

PRESETS: dict[str, Config] = {name: preset() for name, preset in _PRESET_FUNCTIONS.items()}

_HELP = f"""Fine-tune a checkpoint against rewards.

The first word may be a preset ({", ".join(PRESETS)}) or a YAML file; options change single fields
of it. The defaults below are those of the preset or file before --help, as in `train sd15 --help`;
without one they are of a short run of the embedded model.

--resume RUN, --quiet, --verbose and --distributed: see `diffusion-grpo --help`.
"""


def describe_preset(name: str) -> str:
    """Return the one line that says what a preset is."""
    return (_PRESET_FUNCTIONS[name].__doc__ or "").strip().splitlines()[0]


def load_config(
    preset_or_yaml: str | None,
    overrides: Sequence[str] = (),
    *,
    prog: str = "diffusion-grpo train",
) -> Config:
    """Build and validate a run's configuration: a preset or a file, then flags on top.

    Args:
        preset_or_yaml: the name of a preset; or the path of a YAML file with the fields of
            `Config`, which may name the `preset` it starts from; or None for the defaults.
        overrides: flags such as `["--grpo.clip-low", "1e-3"]`; `--help` prints all of them.
        prog: the command that `--help` shows.

    Returns:
        The configuration, validated.

    Raises:
        UsageError: an unknown preset, file, field or flag (with the nearest one), or a value that
            a field or `Config.validate` refuses.
        SystemExit: with code 0, after `--help`.
    """
    config = _parse_flags(_starting_point(preset_or_yaml), overrides, prog)
    config.validate()
    return config


def from_dict(
    values: Mapping[Any, Any], *, base: Config | None = None, source: str = "config"
) -> Config:
    """Return a configuration with the fields of a nested mapping, strictly.

    Args:
        values: section names to mappings of field names to values.
        base: where fields that are not given come from; the defaults unless given. Without one,
            `reward.options` are all that there are, as `to_yaml` writes them.
        source: what the values were read from, for the messages.

    Raises:
        UsageError: an unknown section or field (with the nearest one), or a wrong value.
    """
    whole, base = base is None, base or Config()
    sections: dict[str, Section] = {
        field.name: getattr(base, field.name) for field in dataclasses.fields(base)
    }
    for name, fields in values.items():
        if name not in sections:
            raise UsageError(
                f"{source}: unknown field {name!r}{suggest(str(name), sections)}; expected "
                f"{', '.join(sections)}"
            )
        if not isinstance(fields, Mapping):
            raise UsageError(f"{source}: {name} is {fields!r}; expected a mapping of its fields")
        sections[name] = update_section(sections[name], fields, source=source)
    config = dataclasses.replace(base, **sections)
    if whole and "options" in values.get("reward", {}):
        base = dataclasses.replace(base, reward=dataclasses.replace(base.reward, options=()))
    given = {(name, field) for name, fields in values.items() for field in fields}
    return _drop_inherited(base, config, given)


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML text; `load_config` reads it back to an equal one."""
    plain = {
        section: {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }
        for section, fields in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _starting_point(preset_or_yaml: str | None) -> Config:
    """Return what flags are laid over: the defaults, a preset, or a file."""
    if preset_or_yaml is None:
        return Config()
    if preset_or_yaml in PRESETS:
        return PRESETS[preset_or_yaml]
    path = Path(preset_or_yaml).expanduser()
    if path.is_file():
        return _read_yaml(path)
    if path.suffix in (".yaml", ".yml") or path.name != preset_or_yaml:
        raise UsageError(f"config file {preset_or_yaml!r}: no such file")
    raise UsageError(
        f"unknown preset {preset_or_yaml!r}{suggest(preset_or_yaml, PRESETS)}; expected "
        f"{', '.join(PRESETS)}, or the path of a YAML file"
    )


def _read_yaml(path: Path) -> Config:
    """Read a configuration file, from the preset that it names or from the defaults."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: expected a mapping of sections such as 'model' or 'rollout'")
    values = dict(values)
    preset = values.pop("preset", None)
    if preset is not None and preset not in list(PRESETS):  # it may be of any type
        raise UsageError(
            f"{path}: unknown preset {preset!r}{suggest(str(preset), PRESETS)}; expected "
            f"{', '.join(PRESETS)}"
        )
    return from_dict(values, base=PRESETS[preset] if preset else None, source=str(path))


def _parse_flags(config: Config, flags: Sequence[str], prog: str) -> Config:
    """Lay command-line flags over a configuration; tyro's complaints become a `UsageError`."""
    _reject_unknown_flags(flags)
    with refusals():
        parsed = tyro.cli(
            Config,
            default=config,
            args=list(flags),
            prog=prog,
            description=_HELP,
            config=(tyro.conf.FlagConversionOff,),
        )
    names = [flag.partition("=")[0][2:] for flag in flags if flag.startswith("--")]
    places = [name.replace("-", "_").partition(".") for name in names]
    return _drop_inherited(config, parsed, {(section, field) for section, _, field in places})


def _drop_inherited(base: Config, config: Config, fields: set[tuple[str, str]]) -> Config:
    """Keep of the base's options what is not given anew, and leave out what has lost its owner.

    Options of rewards are laid over the base's one by one: `clip.scale=logit` leaves `clip.model`
    as it was. The options of a reward go with the reward, which is another one if it is found
    elsewhere: `my/clip.py` has those of no built-in `clip`. The held-out list goes with the
    training list: it is held out from that one. An embedded checkpoint goes with the embedded
    world: it is no judge of other prompts that another model draws.

    Args:
        base: what the configuration was laid over.
        config: the outcome.
        fields: sections and fields that were given anew, be it with the base's value.
    """
    rewards = (*config.reward.rewards, *config.eval.gold)
    given = config.reward.options if ("reward", "options") in fields else ()
    named = {option.partition("=")[0].strip() for option in given}
    inherited = [o for o in base.reward.options if o.partition("=")[0].strip() not in named]
    kept = names_of_same(rewards, (*base.reward.rewards, *base.eval.gold))
    inherited = [o for o in inherited if _owner(o) in kept]
    if (
        config.model.pretrained != base.model.pretrained
        and config.prompts.train != base.prompts.train
    ):
        embedded = embedded_checkpoints()
        inherited = [o for o in inherited if o.partition("=")[2] not in embedded]
    in_use = _options_of(rewards, given)
    own = [o for o in given if o in in_use or o not in base.reward.options]
    prompts = config.prompts
    if prompts.train != base.prompts.train and ("prompts", "heldout") not in fields:
        prompts = dataclasses.replace(prompts, heldout=None)
    reward = dataclasses.replace(config.reward, options=(*inherited, *own))
    return dataclasses.replace(config, reward=reward, prompts=prompts)


def _reject_unknown_flags(flags: Sequence[str]) -> None:
    """Raise a `UsageError` for a flag that does not exist, with the nearest that does."""
    known = {"--help", *SHORT_FLAGS}
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config, section.name)):
            known.add(f"--{section.name}.{field.name}".replace("_", "-"))
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and name not in known:
            last = {choice.rpartition(".")[2]: choice for choice in sorted(known)}
            near = suggest(name, known)
            if not near and name.removeprefix("--") in last:  # --clip-low for --grpo.clip-low
                near = f" (did you mean {last[name.removeprefix('--')]!r}?)"
            raise UsageError(f"unknown option {flag.partition('=')[0]!r}{near}; --help lists all")
