"""Every built-in reward keeps the contract that `diffusion-grpo check-reward` asks of a user's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip_checkpoints import write_image_reward
from reward_servers import answering
from safetensors.torch import save_file

from diffusion_grpo.reward import list_rewards, load_reward, of_group, wrap_reward
from diffusion_grpo.reward_check import GROUP_SIZE, check_reward, sample_images

QUOTED = ['a sign that says "HELLO"'] * 4 + ['a "B" on a wall'] * 4
CAPTIONS = ["a red circle"] * 4 + ["a blue square"] * 4


def chat(path: str, body: bytes, handler: Any) -> Any:
    """A judge that likes long pictures, as an OpenAI-compatible endpoint says so."""
    if handler.command == "GET":
        return {"data": [{"id": "judge"}]}
    content = json.loads(body)["messages"][0]["content"]
    length = len(content[1]["image_url"]["url"])
    return {"choices": [{"message": {"content": f"Well. Score: {length % 97 / 10:.1f}"}}]}


def options_for(name: str, folder: Path, stack: contextlib.ExitStack) -> dict[str, str]:
    """What a reward needs beside its defaults, which would ask the hub for weights."""
    clip = {"model": "shapes-clip", "batch_size": "3"}
    if name == "aesthetic":
        torch.manual_seed(0)
        save_file(dict(torch.nn.Linear(256, 1).state_dict()), folder / "head.safetensors")
        return clip | {"head": str(folder / "head.safetensors")}
    if name == "vlm":
        return {"model": "judge", "base_url": stack.enter_context(answering(chat))}
    if name == "image_reward":
        write_image_reward(folder)
        file = str(folder / "ImageReward.pt")
        return {"model": file, "tokenizer": str(folder), "heads": "3,4", "batch_size": "3"}
    others = {
        "clip": clip,
        "diversity": clip,
        "hpsv2": clip | {"base": "shapes-clip"},
        "pickscore": clip | {"processor": "shapes-clip"},
    }
    return others.get(name, {})


@pytest.mark.parametrize("name", list_rewards())
def test_built_in_reward_keeps_the_contract(name, tmp_path) -> None:
    with contextlib.ExitStack() as stack:
        options = options_for(name, tmp_path, stack)
        reward = load_reward(name, options)
        prompts = QUOTED if name == "ocr" else CAPTIONS
        findings = list(check_reward(reward, sample_images(8, 64), prompts))
    assert reward.name == name
    # a network is given no more images than it embeds at once; a group is never cut
    assert reward.of_group or reward.batch_size == (3 if "batch_size" in options else None)
    assert [f for f in findings if f.verdict == "fail"] == []
    assert sum(f.verdict == "ok" for f in findings) >= 3


@pytest.mark.parametrize("name", list_rewards())
def test_built_in_reward_says_what_it_is(name) -> None:
    from diffusion_grpo.resources import resource_path

    text = resource_path("rewards", f"{name}.py").read_text()
    doc = text.split('"""')[1]
    assert "r = " in doc or "r_i = " in doc, "the formula"
    assert "ange: " in doc or " in [" in doc, "the range"


def checked(function: Any) -> dict[str, str]:
    images = sample_images(8, 16)
    found = check_reward(wrap_reward(function, name="mine"), images, CAPTIONS)
    return {finding.text: finding.verdict for finding in found}


def of(findings: dict[str, str], verdict: str) -> str:
    return "; ".join(text for text, given in findings.items() if given == verdict)


def test_what_breaks_the_contract_is_found() -> None:
    def mean(images, prompts, metadata):
        return images.mean(axis=(1, 2, 3))

    assert "fail" not in checked(mean).values()

    def shape(images, prompts, metadata):
        return mean(images, prompts, metadata)[:, None]

    assert "returned shape (8, 1)" in of(checked(shape), "fail")

    def rank(images, prompts, metadata):
        return np.argsort(np.argsort(mean(images, prompts, metadata)))

    assert "mark it with diffusion_grpo.reward.of_group" in of(checked(rank), "fail")

    def ranks_in_group(images, prompts, metadata):
        assert len(images) == GROUP_SIZE
        return rank(images, prompts, metadata)

    assert "fail" not in checked(of_group(ranks_in_group)).values()

    def place(images, prompts, metadata):
        return np.arange(len(images))

    assert "the scores do not follow them" in of(checked(place), "fail")


def test_what_a_user_should_know_is_noted() -> None:
    rng = np.random.default_rng(0)

    def one(images, prompts, metadata):
        return np.ones(len(images))

    def noisy(images, prompts, metadata):
        return images.mean(axis=(1, 2, 3)) + rng.normal(size=len(images)) * 1e-4

    def square_only(images, prompts, metadata):
        assert images.shape[1] == images.shape[2], "square images, please"
        return images.mean(axis=(1, 2, 3))

    assert "nothing could be learned" in of(checked(one), "note")
    assert "other scores, by up to" in of(checked(noisy), "note")
    assert "16x24 are refused" in of(checked(square_only), "note")
    assert "square images, please" in of(checked(square_only), "note")
