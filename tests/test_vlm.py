"""A vision-language judge behind an OpenAI-compatible endpoint on the loopback interface."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def judging(judge: Callable[[str, bytes, Any], Any], models: Any = None) -> Iterator[str]:
    """Run an endpoint that answers GET /v1/models, and all else by `judge`."""
    models = {"object": "list", "data": [{"id": "judge"}]} if models is None else models

    def handle(path: str, body: bytes, handler: Any) -> Any:
        if handler.command == "GET":
            return models if path == "/v1/models" else (404, "nothing here", {})
        return judge(path, body, handler)

    with answering(handle) as url:
        yield url


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
    with judging(judge) as url:
        judged = vlm(url, template=template, lowest=0, highest=5, max_tokens=7, extra='{"seed": 3}')
        found = judged(images, ["a {dog}", "b", "c", "score: 9"]).total
    np.testing.assert_allclose(found, images[:, 0, 0, 0] / 255, atol=1e-4)
    assert seen == [("/v1/chat/completions", "Bearer key", "judge", 3)] * 4


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 0.7),
        ("Score (0-10): 8", 0.8),
        ("Score [from 0 to 10]: 8", 0.8),
        ("Score 0-10: 7", 0.7),
        ("Score: .5", 0.05),
        ("Score: 7,5", 0.75),
        ("Score: 8, and not 3", 0.8),
        ("Score: 8\n\nUnderscore 3", 0.8),
        ("Both are there.\n**Score:** 8.5/10", 0.85),
        ("A score of 2 for color, but overall\nscore = 6", 0.6),
        (" 10 ", 1.0),
        ("Score: 0", 0.0),
    ],
)
def test_the_last_score_of_a_reply_is_read(text, score) -> None:
    with judging(lambda *_: reply(text)) as url:
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
    with judging(lambda *_: answer) as url:
        with pytest.raises(RewardError, match=message):
            vlm(url)(pictures(1), ["a"])


def test_a_judge_that_hesitates_is_asked_again(monkeypatch) -> None:
    answers = [(429, "slow down", {"Retry-After": "3"}), reply("Well…"), reply("Score: 5")]
    pauses: list[float] = []
    monkeypatch.setattr(http_json, "clock", lambda: sum(pauses))
    monkeypatch.setattr(http_json, "pause", pauses.append)
    with judging(lambda *_: answers.pop(0)) as url:
        found = vlm(url, retries=2)(pictures(1), ["a"]).total
    assert found == [0.5] and pauses == [3.0, 1.0]


def test_a_template_can_be_a_file(tmp_path) -> None:
    (tmp_path / "ask.txt").write_text("Rate {prompt}, please.")
    asked = []

    def judge(path: str, body: bytes, handler: Any) -> Any:
        asked.append(json.loads(body)["messages"][0]["content"][0]["text"])
        return reply("5")

    with judging(judge) as url:
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
        ({"model": "m", "base_url": "127.0.0.1:8000/v1"}, "expected a URL such as http://"),
        ({"model": "m", "base_url": "ftp://host/v1"}, "expected a URL such as http://"),
        ({"model": "m", "base_url": "https:///v1"}, "expected a URL such as http://"),
        ({"model": "m", "base_url": "http://host/v1?a=b"}, "expected a URL such as http://"),
        ({"model": "m", "base_url": "http://host:port/v1"}, "expected a URL such as http://"),
        ({"model": "m", "base_url": "http://h/v1/chat/completions/"}, "without /chat/completions"),
    ):
        with pytest.raises(UsageError, match=message):
            load_reward("vlm", options)
    with pytest.raises(UsageError, match="user or password in it") as refused:
        load_reward("vlm", {"model": "m", "base_url": "http://me:secret@host/v1"})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((401, '{"error": {"message": "no such key"}}', {}), "401: no such key; OPENAI_API_KEY is"),
        ((403, "forbidden", {}), "status 403: forbidden; OPENAI_API_KEY is not set"),
        ((307, "", {"Location": "https://elsewhere/"}), "give the URL that it redirects to"),
        ((200, "<!doctype html>", {}), "GET /models is no JSON: '<!doctype html>'; .* ends in /v1"),
    ],
)
def test_an_endpoint_that_refuses_is_told_before_the_run(models, message, monkeypatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with judging(lambda *_: reply("Score: 5"), models) as url:
        with pytest.raises(UsageError, match=f"vlm.base_url = '{url}/v1'.*{message}"):
            vlm(url)


def test_an_endpoint_that_is_not_there_is_told_before_the_run() -> None:
    with judging(lambda *_: reply("Score: 5")) as url:
        pass
    with pytest.raises(
        UsageError, match=f"{url}/v1.*no connection.*is it running, and is its port"
    ):
        vlm(url)


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ((404, "nothing here", {}), ""),
        ((405, "not so", {}), ""),
        ((429, "slow down", {}), ""),
        ((503, "loading the model", {}), ""),
        ({"models": ["judge"]}, ""),
        ({"data": 3}, ""),
        ({"data": []}, ""),
        (["judge"], ""),
        ({"data": [{"id": "other"}, {"id": "judge"}]}, ""),
        ({"data": [{"id": "jugde"}]}, "does not list the model 'judge' (did you mean 'jugde'?)"),
    ],
)
def test_an_endpoint_need_not_list_its_models(models, told, capsys) -> None:
    with judging(lambda *_: reply("Score: 5"), models) as url:
        assert vlm(url)(pictures(1), ["a"]).total == [0.5]
    said = capsys.readouterr().err
    assert told in said if told else said == ""
