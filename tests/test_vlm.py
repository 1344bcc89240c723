"""A vision-language judge behind an OpenAI-compatible endpoint on the loopback interface."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reward_servers import answering

from diffusion_grpo import http_json
from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import RewardError, RewardSet, load_reward


def pictures(count: int = 4) -> np.ndarray:
    shape = (count, 8, 12, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reply(text: Any) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def vlm(url: str, **options: Any) -> RewardSet:
    given = {"model": "judge", "base_url": f"{url}/v1", "retries": "0"}
    loaded = load_reward("vlm", given | {key: str(value) for key, value in options.items()})
    return RewardSet((loaded,), (1.0,))


def test_each_image_is_judged_with_its_prompt(monkeypatch) -> None:
    seen = []

    def judge(path: str, body: bytes, handler: Any) -> Any:
        message = json.loads(body)
        seen.append((path, handler.headers["Authorization"], message["model"], message["seed"]))
        text, image = message["messages"][0]["content"]
        kind, _, data = image["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64" and message["max_tokens"] == 7
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        return reply(f"{text['text']} Score: {pixels[0, 0, 0] / 51:.4f}")

    monkeypatch.setenv("OPENAI_API_KEY", "key")
    images = pictures()
    template = 'Is {this} "{prompt}"? From {lowest} to {highest}.'
    with answering(judge) as url:
        judged = vlm(url, template=template, lowest=0, highest=5, max_tokens=7, extra='{"seed": 3}')
        found = judged(images, ["a {dog}", "b", "c", "score: 9"]).total
    np.testing.assert_allclose(found, images[:, 0, 0, 0] / 255, atol=1e-4)
    assert seen == [("/v1/chat/completions", "Bearer key", "judge", 3)] * 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 0.7),
        ("Both are there.\n**Score:** 8.5/10", 0.85),
        ("A score of 2 for color, but overall\nscore = 6", 0.6),
        (" 10 ", 1.0),
        ("Score: 0", 0.0),
    ],
)
def test_the_last_score_of_a_reply_is_read(text, score) -> None:
    with answering(lambda *_: reply(text)) as url:
        np.testing.assert_allclose(vlm(url)(pictures(1), ["a"]).total, [score], rtol=1e-6)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply("I cannot judge this."), "the reply has no 'Score: N': 'I cannot judge this.'"),
        (reply("Score: 11"), "the reply's score 11 is not from 0 to 10"),
        (reply("Score: -3"), "the reply's score -3 is not from 0 to 10"),
        (reply(None), "the reply has no 'Score: N': ''"),
        ({"choices": []}, "no chat completion: '{\"choices\": \\[\\]}'"),
        ((401, '{"error": {"message": "no such key"}}', {}), "status 401: no such key"),
        ((429, "slow down", {"Retry-After": "1"}), "status 429: slow down"),
    ],
)
def test_a_reply_without_a_score_is_an_error_that_says_what_came(answer, message) -> None:
    with answering(lambda *_: answer) as url:
        with pytest.raises(RewardError, match=message):
            vlm(url)(pictures(1), ["a"])


def test_a_judge_that_hesitates_is_asked_again(monkeypatch) -> None:
    answers = [(429, "slow down", {"Retry-After": "3"}), reply("Well…"), reply("Score: 5")]
    pauses: list[float] = []
    monkeypatch.setattr(http_json, "pause", pauses.append)
    with answering(lambda *_: answers.pop(0)) as url:
        found = vlm(url, retries=2)(pictures(1), ["a"]).total
    assert found == [0.5] and pauses == [3.0, 1.0]


def test_a_template_can_be_a_file(tmp_path) -> None:
    (tmp_path / "ask.txt").write_text("Rate {prompt}, please.")
    asked = []

    def judge(path: str, body: bytes, handler: Any) -> Any:
        asked.append(json.loads(body)["messages"][0]["content"][0]["text"])
        return reply("5")

    with answering(judge) as url:
        vlm(url, template=f"@{tmp_path / 'ask.txt'}")(pictures(1), ["a dog"])
    assert asked == ["Rate a dog, please."]


def test_options_are_checked() -> None:
    for options, message in (
        ({}, "needs the option 'model'"),
        ({"model": "m", "template": "Good?"}, "vlm.template has no {prompt}"),
        ({"model": "m", "template": "@nowhere.txt"}, "cannot be read"),
        ({"model": "m", "lowest": "5", "highest": "5"}, "5.0 is not below vlm.highest = 5.0"),
        ({"model": "m", "extra": "[1]"}, r"vlm.extra = '\[1\]'; expected a JSON object"),
        ({"model": "m", "concurrency": "0"}, "vlm.concurrency = 0; expected 1 or more"),
        ({"model": "m", "timeout": "0"}, "vlm.timeout = 0.0; expected more than 0"),
    ):
        with pytest.raises(UsageError, match=message):
            load_reward("vlm", options)
