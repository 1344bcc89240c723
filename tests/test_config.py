import dataclasses
import math
import re

import pytest
import yaml

from diffusion_grpo.cli import USAGE
from diffusion_grpo.config import (
    PRESETS,
    Config,
    EvalConfig,
    GRPOOptions,
    ModelConfig,
    PromptsConfig,
    RewardConfig,
    RolloutConfig,
    describe_preset,
    from_dict,
    load_config,
    to_yaml,
)
from diffusion_grpo.errors import UsageError
from diffusion_grpo.sections import SHORT_FLAGS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_valid_and_described(name):
    config = load_config(name)
    assert config == PRESETS[name]
    assert describe_preset(name)


def test_defaults_are_valid():
    assert load_config(None) == Config()


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_reads_back_to_the_same_config(name, tmp_path):
    flags = ["--grpo.clip-low", "1e-7", "--grpo.gradient-steps", "3"]
    config = load_config(name, [*flags, "--rollout.negative-prompt", "ü"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("preset", "flags"),
    [
        ("demo-gold", ["--reward", "clip"]),
        ("demo-gold", ["--eval.gold", "clip"]),
        ("demo", ["--reward", "jpeg_size", "--eval.gold", "clip"]),
        ("sd15", ["--reward", "my/clip.py", "--model", "a/b"]),
    ],
)
def test_a_run_that_goes_on_has_the_reward_options_that_it_began_with(preset, flags, tmp_path):
    config = load_config(preset, flags)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    again = load_config(str(path), ["--run.output", "x", "--iterations", "900"])
    assert again.reward == config.reward
    assert again.training_rewards() == config.training_rewards()
    assert again.gold_rewards() == config.gold_rewards()


def test_reward_options_are_not_inherited_by_what_they_do_not_suit():
    # The user's own file is not the built-in reward of its name.
    assert load_config("sd15", ["--reward", "my/clip.py"]).reward.options == ()
    # The embedded CLIP knows captions of shapes; of another model it may judge those still.
    sd, animals = ["--model", "a/sd"], ["--prompts", "animals"]
    shapes = "clip.model=shapes-clip"
    assert shapes not in load_config("demo", [*sd, *animals]).reward.options
    assert shapes in load_config("demo", sd).reward.options
    assert shapes in load_config("demo", animals).reward.options
    mine = {"pretrained": "a/sd"}, {"train": "animals"}, {"rewards": ["clip"]}
    config = from_dict(dict(zip(("model", "prompts", "reward"), mine, strict=True)))
    assert config.reward.options == ()
    given = load_config("demo", [*sd, *animals, "--reward.options", shapes])
    assert shapes in given.reward.options


def test_options_that_are_given_anew_stay_though_they_are_the_preset_s():
    (clip,) = load_config("sd15").reward.options
    own = load_config("sd15", ["--reward", "my/clip.py", "--reward.options", clip])
    assert own.reward.options == (clip,)
    both = load_config("demo").reward.options
    other = ["--model", "a/sd", "--prompts", "animals", "--reward.options", *both]
    assert load_config("demo", other).reward.options == both
    # All of the preset's with another reward: those of the one that is not in use go with it.
    other = load_config("demo", ["--reward", "jpeg_size", "--reward.options", *both])
    assert other.reward.options == both[1:]
    file = {"reward": {"rewards": ["my/clip.py"], "options": [clip]}}
    assert from_dict(file, base=load_config("sd15")).reward.options == (clip,)


def test_a_file_is_the_same_reward_however_its_path_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = load_config(None, ["--reward", "my/r.py:f", "--reward.options", "f.scale=3"])
    for path, kept in (("./my/r.py:f=2", 1), (f"{tmp_path}/my/r.py:f", 1), ("r.py:f", 0)):
        found = from_dict({"reward": {"rewards": [path]}}, base=base)
        assert found.reward.options == ("f.scale=3",) * kept


def test_flags_are_laid_over_a_preset():
    flags = ["--grpo.clip-low", "1e-3", "--eval.gold", "jpeg_size", "my.py:f=2"]
    flags += ["--rollout.same_initial_noise", "True", "--prompts.heldout=None"]
    config = load_config("demo", flags)
    demo = PRESETS["demo"]
    assert config == dataclasses.replace(
        demo,
        grpo=dataclasses.replace(demo.grpo, clip_low=1e-3),
        eval=dataclasses.replace(demo.eval, gold=("jpeg_size", "my.py:f=2")),
        rollout=dataclasses.replace(demo.rollout, same_initial_noise=True),
        prompts=dataclasses.replace(demo.prompts, heldout=None),
        reward=dataclasses.replace(demo.reward, options=("clip.model=shapes-clip",)),
    )


def test_short_flags_reach_their_fields():
    values = ["a/b", "birds", "jpeg_size", "out", "7", "3"]
    flags = [word for pair in zip(SHORT_FLAGS, values, strict=True) for word in pair]
    config = load_config("demo", flags)
    assert config.model.pretrained == "a/b"
    assert config.prompts.train == "birds"
    assert config.reward.rewards == ("jpeg_size",)
    assert (config.run.output, config.run.iterations, config.run.seed) == ("out", 7, 3)


def test_file_starts_from_the_preset_it_names(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("preset: sd15\noptim: {learning_rate: 1e-4}\nreward: {rewards: [clip=2]}\n")
    config = load_config(str(path), ["--run.seed", "5"])
    sd15 = PRESETS["sd15"]
    assert yaml.safe_load("1e-4") == "1e-4"  # why text is accepted for a float
    assert config.optim == dataclasses.replace(sd15.optim, learning_rate=1e-4)
    assert config.reward == dataclasses.replace(sd15.reward, rewards=("clip=2",))
    assert config.run == dataclasses.replace(sd15.run, seed=5)
    assert config.model == sd15.model


def test_help_shows_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config("demo", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(getattr(Config, section.name)):
            assert f"--{section.name}.{field.name}".replace("_", "-") in shown
    assert "diffusion-grpo train" in shown
    assert "images of one prompt" in shown


def test_help_says_what_stands_before_the_options_and_nothing_of_the_code(capsys):
    with pytest.raises(SystemExit):
        load_config("sd15", ["--help"])
    head = _words(capsys.readouterr().out.partition("--model")[0])
    assert f"may be a preset ({', '.join(PRESETS)}) or a YAML file" in head
    for flag in ("--resume", "--quiet", "--verbose", "--distributed"):
        assert flag in head and flag in USAGE
    assert "load_config" not in head and "from_dict" not in head


def _words(text):
    """The text with its whitespace collapsed, so that wrapped lines match."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--grpo.clip-lo", "1"],
            "unknown option '--grpo.clip-lo' (did you mean '--grpo.clip-low'?)",
        ),
        (["--clip-low", "1"], "unknown option '--clip-low' (did you mean '--grpo.clip-low'?)"),
        (["--zzz=1"], "unknown option '--zzz'"),
        (["stray"], "stray"),
        (["--grpo.ratio", "stp"], "invalid choice 'stp' for argument '--grpo.ratio'"),
        (["--optim.learning-rate", "fast"], "--optim.learning-rate: could not convert string"),
        (["--optim.eps"], "Missing value for argument '--optim.eps'"),
        (
            ["--rollout.images-per-prompt", "1"],
            "rollout.images_per_prompt is 1; expected 2 or more",
        ),
        (["--grpo.beta", "-0.1"], "grpo.beta is -0.1; expected 0 or more"),
        (["--optim.learning-rate", "nan"], "optim.learning_rate is nan; expected a finite number"),
        (["--rollout.height", "64"], "rollout.height is 64 and rollout.width is None"),
        (["--reward"], "reward.rewards is (); expected at least one reward"),
    ],
)
def test_bad_flag_is_refused_with_the_mend(flags, message, capsys):
    with pytest.raises(UsageError) as refused:
        load_config("demo", flags)
    assert message in _words(str(refused.value))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "dem",
            "unknown preset 'dem' (did you mean 'demo'?); expected demo, demo-gold, demo-mix, sd15",
        ),
        ("zzz", "unknown preset 'zzz'; expected demo, demo-gold, demo-mix, sd15"),
        ("mine.yaml", "config file 'mine.yaml': no such file"),
        ("configs/mine", "config file 'configs/mine': no such file"),
    ],
)
def test_unknown_preset_or_file_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refused:
        load_config(name)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grop: {}", "unknown field 'grop' (did you mean 'grpo'?)"),
        ("grpo: {clip_lo: 1}", "unknown field 'grpo.clip_lo' (did you mean 'clip_low'?)"),
        ("grpo: {1: 1}", "unknown field 'grpo.1'"),
        ("grpo: 3", "grpo is 3; expected a mapping"),
        ("preset: dmo", "unknown preset 'dmo' (did you mean 'demo'?)"),
        ("preset: [demo]", "unknown preset ['demo']"),
        ("- a", "expected a mapping of sections"),
        ("", "expected a mapping of sections"),
        ("a: [", "cannot be read as YAML"),
        ("optim: {learning_rate: fast}", "optim.learning_rate is 'fast'; expected a number"),
        ("optim: {learning_rate: true}", "optim.learning_rate is True; expected a number"),
        ("optim: {learning_rate: .inf}", "optim.learning_rate is inf; expected a finite number"),
        ("optim: {learning_rate: inf}", "optim.learning_rate is inf; expected a finite number"),
        ("rollout: {num_steps: '10'}", "rollout.num_steps is '10'; expected a whole number"),
        ("rollout: {num_steps: 10.5}", "rollout.num_steps is 10.5; expected a whole number"),
        ("rollout: {num_steps: }", "rollout.num_steps is None; expected a whole number"),
        ("rollout: {same_initial_noise: 1}", "rollout.same_initial_noise is 1; expected true"),
        ("reward: {rewards: clip}", "reward.rewards is 'clip'; expected a list"),
        ("reward: {rewards: [1]}", "reward.rewards is [1]; expected text"),
        ("model: {pretrained: 15}", "model.pretrained is 15; expected text"),
        ("model: {trainable: LoRA}", "expected one of 'lora', 'full' (did you mean 'lora'?)"),
        ("model: {trainable: [lora]}", "model.trainable is ['lora']; expected one of"),
    ],
)
def test_bad_file_is_refused_with_its_place(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        load_config(str(path))
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"pretrained": " "}),
        ("model", {"lora_rank": 0}),
        ("model", {"lora_alpha": 0.0}),
        ("model", {"lora_targets": []}),
        ("model", {"lora_targets": ["to_(q"]}),
        ("prompts", {"train": ""}),
        ("prompts", {"heldout": ""}),
        ("rollout", {"prompts_per_iteration": 0}),
        ("rollout", {"images_per_prompt": 0}),
        ("rollout", {"images_per_prompt": 1}),
        ("rollout", {"num_steps": 0}),
        ("rollout", {"eta": -0.1}),
        ("rollout", {"eta": 1.1}),
        ("rollout", {"guidance_scale": -1.0}),
        ("rollout", {"microbatch": 0}),
        ("rollout", {"height": 60, "width": 64}),
        ("rollout", {"width": 64}),
        ("reward", {"rewards": []}),
        ("reward", {"rewards": [""]}),
        ("reward", {"options": ["clip=1"]}),
        ("reward", {"options": ["clip.model"]}),
        ("grpo", {"advantage_eps": 0.0}),
        ("grpo", {"advantage_clip": -5.0}),
        ("grpo", {"clip_low": 0.0}),
        ("grpo", {"clip_low": 1.0}),
        ("grpo", {"clip_high": -1e-4}),
        ("grpo", {"beta": -0.01}),
        ("grpo", {"updates_per_rollout": 0}),
        ("grpo", {"microbatch": -1}),
        ("grpo", {"gradient_steps": 0}),
        ("optim", {"learning_rate": 0.0}),
        ("optim", {"beta1": 1.0}),
        ("optim", {"beta2": -0.1}),
        ("optim", {"eps": 0.0}),
        ("optim", {"weight_decay": -1.0}),
        ("optim", {"max_grad_norm": 0.0}),
        ("optim", {"warmup_iterations": -1}),
        ("eval", {"every": -1}),
        ("eval", {"num_prompts": 0}),
        ("eval", {"images_per_prompt": 0}),
        ("eval", {"num_steps": 0}),
        ("eval", {"seed": -1}),
        ("eval", {"eta": 2.0}),
        ("eval", {"gold": [" "]}),
        ("run", {"output": ""}),
        ("run", {"iterations": 0}),
        ("run", {"seed": -1}),
        ("run", {"save_every": -1}),
        ("run", {"sample_every": -1}),
        ("run", {"log_every": 0}),
    ],
)
def test_value_out_of_bounds_is_refused_by_name(section, values):
    with pytest.raises(UsageError, match=f"{section}.({'|'.join(values)}) .*; expected"):
        from_dict({section: values})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Config(grpo=GRPOOptions(combine="advantages"), reward=RewardConfig(combine="min")),
            "reward.combine is 'min' and grpo.combine is 'advantages'",
        ),
        (Config(reward=RewardConfig(pessimism=2.0)), "reward.pessimism is 2.0, but reward.combine"),
        (
            Config(eval=EvalConfig(stochastic=True), rollout=RolloutConfig(eta=0.0)),
            "eval.stochastic is True, but rollout.eta is 0",
        ),
        (
            Config(rollout=RolloutConfig(microbatch=24)),
            "rollout.microbatch is 24, but an iteration has 8 prompts x 8 images = 64 images; "
            "expected a divisor of 64, the nearest are 16 and 32",
        ),
        (
            Config(grpo=GRPOOptions(microbatch=100)),
            "grpo.microbatch is 100, but an iteration has 8 prompts x 8 images = 64 images; "
            "expected a divisor of 64, the nearest is 64",
        ),
        (
            Config(grpo=GRPOOptions(gradient_steps=21)),
            "grpo.gradient_steps is 21, but rollout.num_steps is 20",
        ),
        (Config(rollout=RolloutConfig(eta=0.0)), "rollout.eta is 0, so no step has a density"),
        (
            Config(rollout=RolloutConfig(num_steps=1), grpo=GRPOOptions(step_weights="gain")),
            "grpo.step_weights is 'gain', which drops the last noisy step",
        ),
    ],
)
def test_sections_that_do_not_fit_each_other_are_refused(config, message):
    with pytest.raises(UsageError) as refused:
        config.validate()
    assert message in str(refused.value)


@pytest.mark.parametrize("microbatch", [size for size in range(1, 65) if 64 % size == 0])
def test_every_divisor_of_the_images_is_a_microbatch(microbatch):
    config = Config(rollout=RolloutConfig(microbatch=microbatch), grpo=GRPOOptions(microbatch=8))
    config.validate()
    assert config.rollout.num_images == 64


def test_whole_numbers_and_lists_become_what_the_fields_hold():
    section = from_dict({"model": {"lora_alpha": 16, "lora_targets": ["to_q"]}}).model
    assert type(section.lora_alpha) is float
    assert section.lora_targets == ("to_q",)
    assert section == ModelConfig(lora_alpha=16, lora_targets=("to_q",))
    assert hash(section) == hash(ModelConfig(lora_alpha=16.0, lora_targets=("to_q",)))


def test_the_home_folder_in_the_output_is_the_user_s(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (tmp_path / "mine.yaml").write_text("run: {output: ~/runs/mine}\n")
    assert load_config(str(tmp_path / "mine.yaml")).run.output == "/home/somebody/runs/mine"
    assert load_config(None, ["--output=~/x~"]).run.output == "/home/somebody/x~"


def test_configs_are_frozen_and_updates_leave_the_base_alone():
    before = to_yaml(PRESETS["demo"])
    from_dict({"grpo": {"beta": 0.5}}, base=PRESETS["demo"])
    assert to_yaml(PRESETS["demo"]) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["demo"].grpo.beta = math.pi  # type: ignore[misc]


def test_none_is_a_value_where_the_field_allows_it():
    values = {"prompts": {"heldout": None}, "grpo": {"gradient_steps": None}}
    config = from_dict(values, base=PRESETS["demo"])
    assert config.prompts == PromptsConfig(train="shapes", heldout=None)
    assert config.grpo.gradient_steps is None


@pytest.mark.parametrize(
    ("flags", "heldout"),
    [
        ([], "shapes_heldout"),
        (["--prompts", "shapes"], "shapes_heldout"),
        (["--prompts", "my.txt"], None),
        (["--prompts.train=my.txt"], None),
        (["--prompts", "my.txt", "--prompts.heldout", "shapes_heldout"], "shapes_heldout"),
        (["--prompts", "my.txt", "--prompts.heldout=other.txt"], "other.txt"),
        (["--prompts.heldout", "other.txt"], "other.txt"),
    ],
)
def test_a_heldout_list_is_not_inherited_by_another_training_list(flags, heldout, tmp_path):
    config = load_config("demo", flags)
    assert config.prompts.heldout == heldout
    path = tmp_path / "config.yaml"  # of the run: what was decided stays
    path.write_text(to_yaml(config))
    assert load_config(str(path), ["--run.output", "x"]).prompts == config.prompts


def test_a_file_that_replaces_the_training_list_does_not_inherit_the_heldout_one():
    prompts = {"train": "my.txt"}
    assert from_dict({"prompts": prompts}, base=PRESETS["sd15"]).prompts.heldout is None
    prompts["heldout"] = "animals_heldout"
    assert from_dict({"prompts": prompts}, base=PRESETS["sd15"]).prompts == PromptsConfig(**prompts)


def test_reward_options_may_name_files_and_hold_any_value():
    options = ("clip.model=owner/name", "my.reward.scale=a=b.c", "jpeg_size.quality=")
    options = (*options, "vlm.template=one line\nand {prompt}")
    assert RewardConfig(options=options).options == options


def test_replaced_reward_takes_its_inherited_options_along(tmp_path):
    gold = "shapes.partial_credit=false"
    assert load_config("demo").reward.options == ("clip.model=shapes-clip", gold)
    assert load_config("demo", ["--reward", "jpeg_size"]).reward.options == (gold,)
    assert from_dict({"reward": {"rewards": ["jpeg_size"]}}).reward.options == ()
    both = load_config("demo", ["--reward", "clip=2", "jpeg_size"])
    assert both.reward.options == ("clip.model=shapes-clip", gold)
    as_gold = load_config("demo", ["--reward", "jpeg_size", "--eval.gold", "clip"])
    assert as_gold.reward.options == ("clip.model=shapes-clip",)
    assert [spec.options for spec in as_gold.training_rewards()] == [{}]
    assert [spec.options for spec in as_gold.gold_rewards()] == [{"model": "shapes-clip"}]


def test_options_of_rewards_are_laid_over_those_of_the_preset_one_by_one(tmp_path):
    gold, model = "shapes.partial_credit=false", "clip.model=shapes-clip"
    scaled = load_config("demo", ["--reward.options", "clip.scale=logit"])
    assert scaled.reward.options == (model, gold, "clip.scale=logit")
    other = load_config("demo", ["--reward.options", "clip.model=mine"])
    assert other.reward.options == (gold, "clip.model=mine")
    same = load_config("demo", ["--reward.options", model])
    assert sorted(same.reward.options) == sorted((model, gold))
    file = tmp_path / "run.yaml"
    file.write_text("preset: demo\nreward:\n  options: [clip.scale=logit]\n")
    assert load_config(str(file)) == scaled


def test_weights_and_options_reach_the_reward_specs():
    flags = ["--reward", "clip=0.5", "a/my.py:f=-2", "--reward.options", "f.scale=3"]
    first, second = load_config("demo", flags).training_rewards()
    assert (first.name, first.weight, first.options) == ("clip", 0.5, {"model": "shapes-clip"})
    assert (second.spec, second.weight, second.options) == ("a/my.py:f", -2.0, {"scale": "3"})
    assert Config().gold_rewards() == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "clip=0"], "zero"),
        (["--reward", "clip=high"], "'high'"),
        (["--reward", "clip", "clip=2"], "twice"),
        (["--eval.gold", "clip"], "twice"),
        (["--reward.options", "clp.model=x"], "did you mean 'clip'?"),
        (["--reward", "jpeg_size", "--reward.options", "clip.model=x"], "not used"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UsageError) as refused:
        load_config("demo", flags)
    assert message in str(refused.value)
