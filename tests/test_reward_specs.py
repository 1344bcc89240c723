from pathlib import Path
from typing import Any, Literal

import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import RewardSpec, parse_reward_specs
from diffusion_grpo.reward_specs import convert_option


def test_weights_and_options_are_read_from_the_command_line() -> None:
    specs = parse_reward_specs(
        ("clip=0.25", "runs/lr=3/my_file.py:sharpness=-2", "my.v2.py", "package.module:score=1e-1"),
        ("clip.model=a=b", "my.v2.radius= 3", "clip.scale=logit"),
    )
    assert specs == [
        RewardSpec("clip", "clip", 0.25, {"model": "a=b", "scale": "logit"}),
        RewardSpec("runs/lr=3/my_file.py:sharpness", "sharpness", -2.0),
        RewardSpec("my.v2.py", "my.v2", 1.0, {"radius": "3"}),
        RewardSpec("package.module:score", "score", 0.1),
    ]


def test_servers_are_named_by_their_path_or_their_host() -> None:
    specs = parse_reward_specs(
        ("http://a:8000=0.5", "https://b.org/rewards/ocr/=2", "http://c:1,http://d:2"),
        ("a:8000.timeout=5", "ocr.retries=1", "c:1.name=faces"),
    )
    assert specs == [
        RewardSpec("http://a:8000", "a:8000", 0.5, {"timeout": "5"}),
        RewardSpec("https://b.org/rewards/ocr/", "ocr", 2.0, {"retries": "1"}),
        RewardSpec("http://c:1,http://d:2", "c:1", 1.0, {"name": "faces"}),
    ]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), (), "no reward given: name at least one"),
        (("clip=abc",), (), "weight 'abc' of reward 'clip=abc' is not a number: expected REWARD="),
        (("clip=",), (), "weight '' of reward 'clip=' is not a number"),
        (("=1.0",), (), "reward '=1.0' has no name"),
        (("clip=0",), (), "weight of reward 'clip' is zero.*leave the reward out"),
        (("clip=nan",), (), "weight 'nan' of reward 'clip' is not finite"),
        (("clip", "clip=2"), (), "reward 'clip' is given twice .*sum of the weights"),
        (("a.py:f", "b.py:f"), (), r"reward 'f' is given twice \('a.py:f' and 'b.py:f'\)"),
        (("clip",), ("clip.model",), "'clip.model' is not of the form REWARD.OPTION=VALUE"),
        (("clip",), ("model=x",), "'model=x' is not of the form REWARD.OPTION=VALUE"),
        (("clip",), ("clip.model=a", "clip.model=b"), "clip.model is given twice"),
        (("clip",), ("clap.model=a",), "not used .did you mean 'clip'.*; rewards in use: clip"),
        (("http://:8000=1",), (), "'http://:8000' is not a server's URL; expected http://host:"),
        (("http://a:99999=1",), (), "'http://a:99999' is not a server's URL"),
        (("http://a?x=1",), (), "'http://a.x' is not a server's URL"),
        (("http://me:secret@a:1",), (), "server 'a': a URL with a password.*REWARD_SERVER_TOKEN"),
        (("my_file.py:",), (), "'my_file.py:' names no function after the colon"),
        (("package.module:",), (), "'package.module:' is not of the form package.module:function"),
        (("my-package:f",), (), "'my-package:f' is not of the form package.module:function"),
    ],
)
def test_what_cannot_be_meant_is_an_error(words, options, message) -> None:
    with pytest.raises(UsageError, match=message):
        parse_reward_specs(words, options)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        ("3", int, 3),
        ("3", float, 3.0),
        (3, float, 3.0),
        ("1e-3", float, 1e-3),
        ("False", bool, False),
        ("yes", bool, True),
        (True, bool, True),
        ("3", str, "3"),
        ("a/b", Path, Path("a/b")),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[1, 2], 2),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("7", str | int, 7),
        ("seven", str | int, "seven"),
        ([1], Any, [1]),
    ],
)
def test_options_are_converted_by_their_annotation(value, annotation, expected) -> None:
    converted = convert_option("option 'x'", value, annotation)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("3.5", int, "option 'x' is '3.5'; expected a whole number"),
        (3.5, int, "option 'x' is 3.5; expected a whole number"),
        (True, int, "option 'x' is True; expected a whole number"),
        ("much", float, "option 'x' is 'much'; expected a number"),
        ("maybe", bool, "option 'x' is 'maybe'; expected true or false"),
        (3, str, "option 'x' is 3; expected text"),
        (
            "cosin",
            Literal["cosine", "logit"],
            "did you mean 'cosine'.*expected one of: cosine, log",
        ),
        ("much", int | None, "option 'x' is 'much'; expected a whole number, or none"),
        ("1,2", list[int], r"annotated list\[int\], which cannot be given as an option"),
    ],
)
def test_a_value_of_another_type_is_an_error(value, annotation, message) -> None:
    with pytest.raises(UsageError, match=message):
        convert_option("option 'x'", value, annotation)
