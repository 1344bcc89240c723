"""The rewards that are models against PyTorch: architectures, scalings, heads, file formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from blip_checkpoints import mlp_head, write_image_reward
from clip_checkpoints import TOKENS, clip_config, randomized, write_clip, write_letters
from PIL import Image
from safetensors.torch import save_file

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import RewardSet, load_reward

PROMPTS = ["a b", "a cat", "dog", "a b", "zebra"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def pictures(height: int = 40, width: int = 60, count: int = 5) -> np.ndarray:
    """Images with content at every scale."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, height // 10, width // 10, 3))
    large = small.repeat(10, 1).repeat(10, 2) + rng.integers(-20, 20, (count, height, width, 3))
    return large.clip(0, 255).astype(np.uint8)


def score(name: str, images: np.ndarray, group_size: int | None = None, **options: Any) -> Any:
    loaded = load_reward(name, {key: str(value) for key, value in options.items()})
    prompts = PROMPTS[: len(images)]
    return RewardSet((loaded,), (1.0,))(images, prompts, group_size=group_size).total


def features(folder: Path, images: np.ndarray, prompts: list[str] = PROMPTS) -> Any:
    """Torch's model, and its normalized embeddings of images and prompts."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    return model, *embed(model, pixel_values, tokenize(folder, prompts))


def tokenize(folder: Path, prompts: list[str]) -> torch.Tensor:
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    encoded = tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS)
    return torch.tensor(encoded["input_ids"])


@torch.no_grad()
def embed(model: Any, pixel_values: torch.Tensor, ids: torch.Tensor) -> Any:
    output = model(input_ids=ids, pixel_values=pixel_values)
    return (
        torch.nn.functional.normalize(output.image_embeds, dim=-1),
        torch.nn.functional.normalize(output.text_embeds, dim=-1),
    )


# --- CLIP with other scalings ---------------------------------------------------------------------


def test_pickscore_is_the_scaled_cosine(checkpoint, tmp_path) -> None:
    images = pictures()
    model, image, text = features(checkpoint, images)
    expected = model.logit_scale.exp() * (image * text).sum(-1)
    bare = tmp_path / "bare"  # PickScore's own repository has no tokenizer
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((checkpoint / name).read_bytes())
    found = score("pickscore", images, model=bare, processor=checkpoint, batch_size=2)
    assert np.ptp(found) > 0.1
    np.testing.assert_allclose(found, expected.detach(), atol=1e-3)


def test_hpsv2_is_the_cosine_of_letterboxed_images(checkpoint) -> None:
    for height, width in ((40, 60), (60, 40), (40, 40)):
        images = pictures(height, width)
        boxed = []
        for image in images:
            scale = 32 / max(height, width)
            size = (round(width * scale), round(height * scale))
            small = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
            box = Image.new("RGB", (32, 32))
            box.paste(small, ((32 - size[0]) // 2, (32 - size[1]) // 2))
            boxed.append(np.asarray(box))
        _, image, text = features(checkpoint, np.stack(boxed))
        found = score("hpsv2", images, model=checkpoint, base=checkpoint)
        assert np.ptp(found) > 0.01
        np.testing.assert_allclose(found, (image * text).sum(-1), atol=1e-4)


def test_diversity_is_the_mean_cosine_distance_to_the_others(checkpoint) -> None:
    images = pictures(count=4)
    _, image, _ = features(checkpoint, images, PROMPTS[:4])
    expected = [
        np.mean([1 - float(image[i] @ image[j]) for j in others if j != i])
        for others in ((0, 1), (2, 3))
        for i in others
    ]
    found = score("diversity", images, group_size=2, model=checkpoint)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[0] == found[1] and found.min() > 1e-3


# --- OpenCLIP's format ----------------------------------------------------------------------------


class Block(torch.nn.Module):
    """OpenCLIP's residual attention block: its names, torch's own attention layer."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, inner), "c_proj": torch.nn.Linear(inner, width)}
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        inner = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](inner)


class Tower(torch.nn.Module):
    def __init__(self, width: int, heads: int, inner: int, layers: int) -> None:
        super().__init__()
        self.resblocks = torch.nn.ModuleList([Block(width, heads, inner) for _ in range(layers)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class OpenCLIP(torch.nn.Module):
    """A CLIP model with OpenCLIP's parameter names, written down from its description."""

    def __init__(self, text: Any, vision: Any, dim: int) -> None:
        super().__init__()
        sizes = lambda c: (c.hidden_size, c.num_attention_heads, c.intermediate_size)  # noqa: E731
        self.transformer = Tower(*sizes(text), text.num_hidden_layers)
        self.token_embedding = torch.nn.Embedding(text.vocab_size, text.hidden_size)
        self.positional_embedding = parameter(text.max_position_embeddings, text.hidden_size)
        self.ln_final = torch.nn.LayerNorm(text.hidden_size)
        self.text_projection = parameter(text.hidden_size, dim)
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
        self.visual = torch.nn.Module()
        width = vision.hidden_size
        self.visual.conv1 = torch.nn.Conv2d(
            3, width, vision.patch_size, vision.patch_size, bias=False
        )
        self.visual.class_embedding = parameter(width)
        patches = (vision.image_size // vision.patch_size) ** 2
        self.visual.positional_embedding = parameter(patches + 1, width)
        self.visual.ln_pre, self.visual.ln_post = (torch.nn.LayerNorm(width) for _ in "ab")
        self.visual.transformer = Tower(*sizes(vision), vision.num_hidden_layers)
        self.visual.proj = parameter(width, dim)
        mask = torch.full((text.max_position_embeddings,) * 2, -torch.inf).triu(1)
        self.register_buffer("attn_mask", mask)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor, ids: torch.Tensor) -> Any:
        v = self.visual
        x = v.conv1(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        image = v.ln_post(v.transformer(v.ln_pre(x))[:, 0]) @ v.proj
        y = self.token_embedding(ids) + self.positional_embedding
        y = self.ln_final(self.transformer(y, self.attn_mask))
        end = (ids == 98).int().argmax(1)  # the end token
        text = y[torch.arange(len(y)), end] @ self.text_projection
        return [torch.nn.functional.normalize(e, dim=-1) for e in (image, text)]


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hpsv2_reads_the_published_format(tmp_path, suffix) -> None:
    config = clip_config()
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"
    model = randomized(OpenCLIP(config.text_config, config.vision_config, config.projection_dim))
    file = tmp_path / f"HPS{suffix}"
    if suffix == ".pt":
        torch.save({"epoch": 3, "name": "hps", "state_dict": model.state_dict()}, file)
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    base = tmp_path / "base"
    base.mkdir()
    write_letters(base)
    config.save_pretrained(base)

    images = pictures(40, 40)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(base)
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    image, text = model(pixel_values, tokenize(base, PROMPTS))
    found = score("hpsv2", images, model=file, base=base)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(found, (image * text).sum(-1), atol=1e-5)

    save_file({"visual.conv2.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError, match="unexpected tensor 'visual.conv2.weight'"):
        load_reward("hpsv2", {"model": str(tmp_path / "odd.safetensors"), "base": str(base)})


# --- Aesthetic heads ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_heads_are_torchs(tmp_path, kind, suffix) -> None:
    from diffusion_grpo.score_head import apply_head, score_head
    from diffusion_grpo.weights import read_weights

    torch.manual_seed(0)
    head = torch.nn.Linear(768, 1) if kind == "linear" else mlp_head(768)
    file = tmp_path / f"head{suffix}"
    (torch.save if suffix == ".pth" else save_file)(head.state_dict(), file)
    embeddings = torch.nn.functional.normalize(torch.randn(64, 768), dim=-1)
    with torch.no_grad():
        expected = (head if kind == "linear" else head.layers)(embeddings)[:, 0]
    found = apply_head(score_head(read_weights(file), source="head"), embeddings.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_aesthetic_is_the_head_of_the_normalized_embedding(checkpoint, tmp_path) -> None:
    torch.manual_seed(0)
    head = mlp_head(20)
    torch.save(head.state_dict(), tmp_path / "head.pth")
    images = pictures()
    _, image, _ = features(checkpoint, images)
    found = score("aesthetic", images, model=checkpoint, head=tmp_path / "head.pth")
    np.testing.assert_allclose(found, head.layers(image).detach()[:, 0], atol=1e-5)
    assert np.ptp(found) > 1e-4


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": (1, 30), "bias": (1,)}, "embeddings of 30 numbers, but .* has 20"),
        ({"weight": (2, 20), "bias": (2,)}, "the last layer returns 2 numbers; expected 1"),
        ({"weight": (1, 20), "bias": (3,)}, r"weight has shape \(1, 20\) and bias \(3,\)"),
        ({"head.weight": (1, 20)}, "holds the tensors head.weight; expected a linear head"),
    ],
)
def test_heads_that_do_not_fit_are_named(checkpoint, tmp_path, tensors, message) -> None:
    file = tmp_path / "head.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(UsageError, match=message):
        load_reward("aesthetic", {"model": str(checkpoint), "head": str(file)})


# --- ImageReward ----------------------------------------------------------------------------------


def test_image_reward_is_blip_with_a_head(tmp_path) -> None:
    vision, text, head = write_image_reward(tmp_path)
    images = pictures(40, 40)
    processor = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        seen = vision(pixel_values).last_hidden_state
        state = text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2]),
        ).last_hidden_state[:, 0]
        expected = (head.layers(state)[:, 0] - 0.16717362830052426) / 1.0333394966054072
    options = {"model": tmp_path / "ImageReward.pt", "tokenizer": tmp_path, "heads": "3,4"}
    found = score("image_reward", images, batch_size=2, **options)
    assert np.ptp(found) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4)


# --- Full size ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "vision", "dim"),
    [
        ("clip", (768, 12, 12, 3072), (1024, 24, 16, 4096), 768),  # ViT-L/14
        ("pickscore", (1024, 24, 16, 4096), (1280, 32, 16, 5120), 1024),  # ViT-H/14
        ("hpsv2", (1024, 24, 16, 4096), (1280, 32, 16, 5120), 1024),
    ],
)
def test_scores_at_full_size(tmp_path, name, text, vision, dim) -> None:
    """Random weights of the published architectures: the same score to 1e-3, in its own unit."""
    activation = "quick_gelu" if name == "clip" else "gelu"

    def sizes(width: int, layers: int, heads: int, inner: int) -> dict[str, Any]:
        return dict(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=inner,
            hidden_act=activation,
        )

    ends = dict(bos_token_id=97, eos_token_id=98, pad_token_id=98)
    config = transformers.CLIPConfig(
        text_config=sizes(*text) | ends | dict(vocab_size=49408, max_position_embeddings=77),
        vision_config=sizes(*vision) | dict(image_size=224, patch_size=14),
        projection_dim=dim,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(np.log(100.0))
    write_letters(tmp_path, 224)
    config.save_pretrained(tmp_path)
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    images = pictures(100, 100, 2)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
    image, words = embed(model, pixel_values, tokenize(tmp_path, PROMPTS[:2]))
    expected = (image * words).sum(-1) * (100.0 if name == "pickscore" else 1.0)
    del model
    options = {"clip": {}, "pickscore": {"processor": tmp_path}, "hpsv2": {"base": tmp_path}}
    found = score(name, images, model=tmp_path, **options[name])
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_round_trip_through_the_host_gives_the_same_scores(checkpoint) -> None:
    import jax.numpy as jnp

    from diffusion_grpo.clip_embedding import CLIPEmbedder
    from diffusion_grpo.reward_bench import clip_round_trip, pillow_preprocess

    embedder = CLIPEmbedder.from_pretrained("clip", str(checkpoint), 4)
    images = pictures()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(checkpoint)
    expected = processor(list(images), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    prepared = [pillow_preprocess(image, embedder.processor) for image in images]
    np.testing.assert_allclose(np.stack(prepared), expected, atol=1e-6)
    timed = clip_round_trip(embedder, jnp.asarray(images), PROMPTS, repeats=1)
    assert timed.images == 5 and timed.device_seconds > 0 and timed.host_seconds > 0
    assert timed.difference < 1e-3
