"""What a reward server and its client say to each other: JSON, with images as PNG in base64.

A server of any make is a reward if it answers these two requests:

- `GET /v1/reward` → `{"name": "clip", "of_group": false, "batch_size": 32}`: its name in the
  metrics, whether it compares the images of one prompt, and the most images of a request or null.
- `POST /v1/score` with `{"images": [PNG, …], "prompts": [text, …], "metadata": [object, …]}`, one
  each of B images of one size → `{"scores": [number, …]}`, B finite numbers. If `of_group`, the B
  images are those of one prompt.

It may ask for a token (`Authorization: Bearer TOKEN`). Errors have a status of 400 or more and the
body `{"error": text}`. 408, 425, 429, 502, 503 and 504 mean that another attempt may succeed, after
`Retry-After` (seconds or a date) if it says so; 413 that fewer images may; 500 and all others above
that another server may. `openapi` describes all of it in OpenAPI 3.1.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

INFO_PATH, SCORE_PATH, OPENAPI_PATH = "/v1/reward", "/v1/score", "/openapi.json"
RETRY_STATUSES = (408, 425, 429, 502, 503, 504)


class ProtocolError(ValueError):
    """A message that does not keep the protocol; the text says where."""


@dataclass(frozen=True)
class Limits:
    """What a server accepts in one request.

    Attributes:
        bytes: of the body.
        images: the number of them.
        pixels: of all images together, once decoded.
    """

    bytes: int = 64 * 2**20
    images: int = 256
    pixels: int = 2**27


def encode_png(image: np.ndarray) -> str:
    """Return a uint8 image [H, W, 3] as a PNG in base64."""
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG", compress_level=1)
    return base64.b64encode(encoded.getvalue()).decode("ascii")


def encode_request(
    images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> bytes:
    """Return the body of a score request for uint8 images [B, H, W, 3]."""
    body = {
        "images": [encode_png(image) for image in images],
        "prompts": list(prompts),
        "metadata": [dict(item) for item in metadata],
    }
    return json.dumps(body).encode()


def decode_request(
    body: bytes, limits: Limits
) -> tuple[np.ndarray, list[str], list[dict[str, Any]]]:
    """Read a score request.

    Args:
        body: as received.
        limits: what is accepted; a PNG is not decoded before its size is known to fit.

    Returns:
        uint8 images [B, H, W, 3], B prompts and B dictionaries.

    Raises:
        ProtocolError: anything else than a request within the limits.
    """
    message = _object(body)
    for key, kind, name in (
        ("images", str, "PNG in base64"),
        ("prompts", str, "text"),
        ("metadata", dict, "object"),
    ):
        value = message.get(key)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise ProtocolError(f"{key!r} is not a list with one {name} an image")
    images, prompts, metadata = (message[key] for key in ("images", "prompts", "metadata"))
    if not images or not len(images) == len(prompts) == len(metadata):
        raise ProtocolError(
            f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata; expected "
            "the same number of each, at least 1"
        )
    if len(images) > limits.images:
        raise ProtocolError(f"{len(images)} images; expected at most {limits.images} in a request")
    left, decoded = limits.pixels, []
    for index, text in enumerate(images):
        decoded.append(_decode_png(text, index, left))
        left -= decoded[-1].shape[0] * decoded[-1].shape[1]
        if decoded[-1].shape != decoded[0].shape:
            raise ProtocolError(
                f"image {index} has shape {decoded[-1].shape}, image 0 has {decoded[0].shape}; "
                "expected one size in a request"
            )
    return np.stack(decoded), prompts, metadata


def _decode_png(text: str, index: int, max_pixels: int) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > max_pixels:
                raise ProtocolError(
                    f"image {index} has {image.width}x{image.height} pixels, more than this "
                    "request may still have; send fewer or smaller images"
                )
            return np.asarray(image.convert("RGB"))
    except ProtocolError:
        raise
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise ProtocolError(f"image {index} is not a PNG in base64 ({e})") from None


def decode_scores(body: bytes, count: int) -> np.ndarray:
    """Read the answer to a score request of `count` images; returns float64 [count].

    Raises:
        ProtocolError: anything else than one finite number an image; names the first bad index.
    """
    scores = _object(body).get("scores")
    if not isinstance(scores, list):
        raise ProtocolError("the answer has no list of 'scores'")
    if len(scores) != count:
        raise ProtocolError(f"the answer has {len(scores)} scores for {count} images")
    for index, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise ProtocolError(f"score {index} of the answer is {score!r}, not a finite number")
    return np.array(scores, np.float64)


def decode_info(body: bytes) -> tuple[str, bool, int | None]:
    """Read the answer to an info request: name, whether it is of a group, batch size.

    Raises:
        ProtocolError: a field is missing or of another type.
    """
    message = _object(body)
    name, of_group, size = (message.get(key) for key in ("name", "of_group", "batch_size"))
    if not isinstance(name, str) or not isinstance(of_group, bool):
        raise ProtocolError("the answer has no text 'name' or no true or false 'of_group'")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ProtocolError(f"'batch_size' is {size!r}; expected null or a whole number above 0")
    return name, of_group, size


def _object(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        shown = body[:80].decode("utf-8", "replace")
        raise ProtocolError(f"not JSON ({error}): {shown!r}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a {type(message).__name__} where an object belongs")
    return message


def openapi(name: str, version: str, *, token: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 description of a server of the reward `name`."""

    def content(schema: Mapping[str, Any]) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": dict(schema)}}}

    def list_of(item: Mapping[str, Any], description: str) -> dict[str, Any]:
        return {"type": "array", "minItems": 1, "items": dict(item), "description": description}

    def ref(schema: str) -> dict[str, str]:
        return {"$ref": f"#/components/schemas/{schema}"}

    errors = {
        "400": "The request does not keep the protocol.",
        "401": "The token is missing or wrong.",
        "408": "The body came too slowly.",
        "413": "The body is too large; fewer images at once may do.",
        "422": "The reward cannot judge such images or prompts.",
        "500": "The reward failed; another server may do.",
        "503": "Too many requests at once; try again after Retry-After seconds.",
    }
    failures = {
        status: {"description": text, **content(ref("Error"))} for status, text in errors.items()
    }
    png = {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"}
    request = {
        "type": "object",
        "required": ["images", "prompts", "metadata"],
        "properties": {
            "images": list_of(png, "B PNG images, RGB, all of one size."),
            "prompts": list_of({"type": "string"}, "What each image was to show."),
            "metadata": list_of({"type": "object"}, "What the prompt file says beside the text."),
        },
    }
    scores = list_of({"type": "number"}, "One finite number an image; higher is better.")
    info = {
        "type": "object",
        "required": ["name", "of_group", "batch_size"],
        "properties": {
            "name": {"type": "string", "description": "The reward's name in the metrics."},
            "of_group": {
                "type": "boolean",
                "description": "Whether a request is all images of one prompt, to be compared.",
            },
            "batch_size": {
                "type": ["integer", "null"],
                "description": "The most images of a request.",
            },
        },
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"diffusion-grpo reward server: {name}", "version": version},
        "paths": {
            INFO_PATH: {
                "get": {
                    "summary": "What this reward is.",
                    "responses": {
                        "200": {"description": "The reward.", **content(ref("Reward"))},
                        "401": failures["401"],
                    },
                }
            },
            SCORE_PATH: {
                "post": {
                    "summary": "Score a batch of images.",
                    "requestBody": {"required": True, **content(ref("ScoreRequest"))},
                    "responses": {
                        "200": {"description": "The scores.", **content(ref("Scores"))},
                        **failures,
                    },
                }
            },
        },
        "components": {
            "schemas": {
                "Reward": info,
                "ScoreRequest": request,
                "Scores": {
                    "type": "object",
                    "required": ["scores"],
                    "properties": {"scores": scores},
                },
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "string"}},
                },
            }
        },
    }
    if token:
        described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"token": []}]
    return described
