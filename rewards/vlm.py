"""A vision-language model as the judge, by any OpenAI-compatible chat endpoint that takes images.

    r = (s − lowest) / (highest − lowest),     s the number after the last "Score:" of the reply

The model gets a template with the prompt filled in, and the image as a PNG. Range: 0 to 1. Which
model, and what it was trained on, is the endpoint's matter; a served open model (vLLM, llama.cpp,
Ollama, …) and a hosted one work alike. It is asked once for its list of models (GET /models) before
anything is drawn, so that a wrong address or key is told then; one that has no such list is taken
as it is. The key is taken from the environment and never written anywhere. Judging by a prompted
language model: Zheng et al., "Judging LLM-as-a-Judge" (2023).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from diffusion_grpo.errors import UsageError, suggest
from diffusion_grpo.http_json import RequestFailed, attempt, request
from diffusion_grpo.reward import reward_factory
from diffusion_grpo.reward_protocol import encode_png

TEMPLATE = (
    'This image was made for the prompt: "{prompt}"\n'
    "Judge how well it shows what the prompt asks for: every object, with its number, color, place "
    "and style, and nothing wrong or broken. Say in one sentence what is right and what is not. "
    "Then end with a line 'Score: N', N a number from {lowest} (not at all) to {highest} "
    "(perfectly)."
)
_FIGURE = r"(-?(?:\d+(?:[.,]\d+)?|\.\d+))"
# A range between "score" and the number, as in "Score (0-10): 8", is not the score.
_SCORE = re.compile(
    rf"\bscore(?:\s*[(\[][^)\]\n]*[)\]]|\s+{_FIGURE}\s*[-–]\s*{_FIGURE}(?=\s*[:=]))?"
    rf"[^\w.-]{{0,6}}{_FIGURE}",
    re.IGNORECASE,
)
_NUMBER = re.compile(rf"\s*{_FIGURE}\s*")


@reward_factory
def vlm(
    model: str,
    base_url: str = "http://127.0.0.1:8000/v1",
    template: str = TEMPLATE,
    lowest: float = 0.0,
    highest: float = 10.0,
    key_variable: str = "OPENAI_API_KEY",
    max_tokens: int = 300,
    extra: str = '{"temperature": 0}',
    concurrency: int = 4,
    timeout: float = 60.0,
    retries: int = 4,
) -> Callable[..., np.ndarray]:
    """Build the reward.

    Args:
        model: the model's name at the endpoint.
        base_url: the endpoint, http or https, without /chat/completions.
        template: what is asked, with {prompt}, {lowest} and {highest}; or @FILE to read it from.
        lowest: the score that becomes 0.
        highest: the score that becomes 1.
        key_variable: the environment variable with the key, if the endpoint wants one.
        max_tokens: the longest reply.
        extra: a JSON object of further fields of the request.
        concurrency: requests at once.
        timeout: seconds for one request.
        retries: attempts after a first one that failed for a passing reason.

    Returns:
        A reward of host images.

    Raises:
        UsageError: a bad option, no endpoint there, or one that refuses the key.
    """
    base_url = _checked_url(base_url)
    fields = _checked(template, lowest, highest, extra, concurrency, timeout, retries)
    asked = fields["template"]
    url = f"{base_url}/chat/completions"
    key = os.environ.get(key_variable, "")
    _greet(base_url, model, key, key_variable, timeout)
    resting: dict[str, float] = {}

    def judge(image: np.ndarray, prompt: str) -> float:
        question = _fill(asked, prompt=prompt, lowest=f"{lowest:g}", highest=f"{highest:g}")
        picture = {"url": f"data:image/png;base64,{encode_png(image)}"}
        content = [
            {"type": "text", "text": question},
            {"type": "image_url", "image_url": picture},
        ]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            **fields["extra"],
        }

        def ask(server: str) -> float:
            answer = request(server, json.dumps(body).encode(), token=key, timeout=timeout)
            return (read_score(answer, lowest, highest) - lowest) / (highest - lowest)

        return attempt([url], ask, retries=retries, resting=resting)

    def reward(
        images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> np.ndarray:
        """Score uint8 images [B, H, W, 3]; returns float32 [B] in [0, 1]."""
        with ThreadPoolExecutor(concurrency, "vlm") as pool:
            return np.asarray(list(pool.map(judge, images, prompts)), np.float32)

    return reward


def _checked_url(base_url: str) -> str:
    """Return the URL without a slash at its end, or raise a `UsageError`."""
    url = base_url.strip().rstrip("/")
    try:
        parts = urlsplit(url)
        sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, sound = urlsplit(""), False
    if parts.username is not None:
        raise UsageError(
            "vlm.base_url has a user or password in it, which would be written into the run's "
            "config; set vlm.key_variable and the environment variable of that name instead"
        )
    if not sound or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(
            f"vlm.base_url = {base_url!r}; expected a URL such as http://127.0.0.1:8000/v1"
        )
    if parts.path.endswith("/chat/completions"):
        raise UsageError(
            f"vlm.base_url = {base_url!r}; give it without /chat/completions, which is added"
        )
    return url


def _greet(base_url: str, model: str, key: str, key_variable: str, timeout: float) -> None:
    """Ask the endpoint for its models, so that what is wrong with it is told before work starts.

    Any answer that is no refusal will do: not every endpoint lists its models, and some take names
    that they do not list.

    Raises:
        UsageError: no answer, a redirect, one that refuses the key, or one that is no JSON.
    """
    where = f"vlm.base_url = {base_url!r}: GET /models"
    try:
        answer = request(f"{base_url}/models", token=key, timeout=timeout)
    except RequestFailed as failure:
        status = failure.status
        if status is None:
            raise UsageError(f"{where}: {failure}; is it running, and is its port right?") from None
        if status in (401, 403):
            given = "is wrong" if key else "is not set"
            raise UsageError(
                f"{where}: {failure}; {key_variable} {given} in the environment"
            ) from None
        if 300 <= status < 400:
            raise UsageError(f"{where}: {failure}; give the URL that it redirects to") from None
        return
    try:
        listed = json.loads(answer)
    except ValueError:
        shown = answer[:80].decode("utf-8", "replace")
        raise UsageError(
            f"{where} is no JSON: {shown!r}; expected the base of an OpenAI-compatible API, which "
            "often ends in /v1"
        ) from None
    entries = listed.get("data") if isinstance(listed, dict) else None
    entries = entries if isinstance(entries, list) else []
    names = [str(e["id"]) for e in entries if isinstance(e, dict) and "id" in e]
    if names and model not in names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        print(
            f"vlm: {base_url} does not list the model {model!r}{suggest(model, names)}; it lists: "
            f"{shown}",
            file=sys.stderr,
        )


def _checked(
    template: str,
    lowest: float,
    highest: float,
    extra: str,
    concurrency: int,
    timeout: float,
    retries: int,
) -> dict[str, Any]:
    """Return the template's text and the further fields, or raise a `UsageError`."""
    if template.startswith("@"):
        try:
            with open(template[1:], encoding="utf-8") as file:
                template = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"vlm.template = {template!r} cannot be read: {error}") from None
    if "{prompt}" not in template:
        raise UsageError("vlm.template has no {prompt}; expected it where the prompt goes")
    if not lowest < highest:
        raise UsageError(f"vlm.lowest = {lowest} is not below vlm.highest = {highest}")
    try:
        fields = json.loads(extra)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UsageError(f"vlm.extra = {extra!r}; expected a JSON object")
    for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0)):
        if value < least:
            raise UsageError(f"vlm.{name} = {value}; expected {least} or more")
    if not timeout > 0:
        raise UsageError(f"vlm.timeout = {timeout}; expected more than 0 seconds")
    return {"template": template, "extra": fields}


def _fill(template: str, **values: str) -> str:
    """Fill names in braces in; other braces stay, those of the prompt too."""
    return re.sub(r"\{(prompt|lowest|highest)\}", lambda match: values[match[1]], template)


def read_score(answer: bytes, lowest: float, highest: float) -> float:
    """Read the score out of a chat completion.

    Returns:
        The number after the last "score", or the whole reply if it is a number.

    Raises:
        RequestFailed: no chat completion, no number, or one out of range; asking again may help.
    """
    try:
        reply = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = answer[:200].decode("utf-8", "replace")
        raise RequestFailed(f"no chat completion: {shown!r}", temporary=True) from None
    reply = reply if isinstance(reply, str) else ""
    whole = _NUMBER.fullmatch(reply)
    found = [match[3] for match in _SCORE.finditer(reply)] or ([whole[1]] if whole else [])
    if not found:
        raise RequestFailed(f"the reply has no 'Score: N': {reply[-200:]!r}", temporary=True)
    score = float(found[-1].replace(",", "."))
    if not lowest <= score <= highest:
        raise RequestFailed(
            f"the reply's score {score:g} is not from {lowest:g} to {highest:g}", temporary=True
        )
    return score
