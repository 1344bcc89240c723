import dataclasses

import numpy as np
import pytest
from scipy import ndimage as scipy_ndimage

from diffusion_grpo.errors import UsageError
from diffusion_grpo.resources import resource_path
from diffusion_grpo.reward import load_reward
from diffusion_grpo.shapes.captions import captions, hard_negatives
from diffusion_grpo.shapes.detect import detect, label_components
from diffusion_grpo.shapes.render import render
from diffusion_grpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    PALETTE,
    SHAPES,
    TASKS,
    TINTS,
    Scenes,
    sample_scenes,
)
from diffusion_grpo.shapes.verify import PARTS, verify

# Not the seeds with which the judge's thresholds were chosen.
SCENES = sample_scenes(np.random.default_rng(20260), 300, split="all")
IMAGES = render(SCENES)
CAPTIONS = captions(SCENES, np.random.default_rng(1))


def _uint8(images: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def _blur(images: np.ndarray, sigma: float) -> np.ndarray:
    blurred = scipy_ndimage.gaussian_filter(
        images.astype(np.float64), (0, sigma, sigma, 0), mode="nearest"
    )
    return _uint8(blurred)


def _noise(images: np.ndarray, sigma: float) -> np.ndarray:
    return _uint8(images + np.random.default_rng(2).normal(0, sigma * 255, images.shape))


def _flat(rgb: tuple[int, int, int]) -> np.ndarray:
    return np.full((1, 64, 64, 3), rgb, np.uint8)


def test_true_captions_pass() -> None:
    assert verify(IMAGES, CAPTIONS).passed.mean() >= 0.99


@pytest.mark.parametrize("sigma", [0.02, 0.05])
def test_noise_does_not_change_the_verdict(sigma: float) -> None:
    assert verify(_noise(IMAGES, sigma), CAPTIONS).passed.mean() >= 0.99


def test_blur_does_not_change_the_verdict() -> None:
    assert verify(_blur(IMAGES, 0.7), CAPTIONS).passed.mean() >= 0.99
    assert verify(_blur(IMAGES, 1.0), CAPTIONS).passed.mean() >= 0.97


def test_a_shift_does_not_change_the_verdict() -> None:
    shifted = np.roll(IMAGES, (1, -1), axis=(1, 2))
    half = _uint8((IMAGES.astype(float) + np.roll(IMAGES, 1, axis=2)) / 2)
    assert verify(shifted, CAPTIONS).passed.mean() >= 0.99
    assert verify(half, CAPTIONS).passed.mean() >= 0.99


def test_no_hard_negative_passes() -> None:
    negatives = hard_negatives(SCENES, np.random.default_rng(3), 3)
    for images in (IMAGES, _noise(IMAGES, 0.05), _blur(IMAGES, 0.7)):
        for k in range(3):
            verdict = verify(images, [false[k] for false in negatives])
            assert not verdict.passed.any()
            assert verdict.score.max() <= 0.7


def test_detected_objects_are_those_of_the_scene() -> None:
    found = detect(IMAGES)
    count = SCENES.present.sum()
    assert len(found.image) == count
    for i in range(len(SCENES)):
        here = np.flatnonzero(found.image == i)
        truth = np.flatnonzero(SCENES.present[i])
        assert len(here) == len(truth)
        for k in truth:
            offsets = np.hypot(found.x[here] - SCENES.x[i, k], found.y[here] - SCENES.y[i, k])
            j = here[offsets.argmin()]
            assert offsets.min() < 1.0
            assert SHAPES[found.shape[j]] == SHAPES[SCENES.shape[i, k]]
            assert COLORS[found.color[j]] == COLORS[SCENES.color[i, k]]
            assert found.size[j] == SCENES.size[i, k]
            assert found.radius[j] == pytest.approx(SCENES.radius[i, k], rel=0.12)
    assert [BACKGROUNDS[b] for b in found.background] == [BACKGROUNDS[b] for b in SCENES.background]


def _everything() -> np.ndarray:
    """All eight colors at once: as stripes, as a checkerboard and as random pixels."""
    palette = np.array(list(PALETTE.values()), np.uint8)
    column, row = np.meshgrid(np.arange(64), np.arange(64))
    rng = np.random.default_rng(4)
    indices = [column // 8, (column // 8 + row // 8) % 8, rng.integers(0, 8, (64, 64))]
    return np.stack([palette[index] for index in indices])


def _junk() -> np.ndarray:
    rng = np.random.default_rng(5)
    flats = [_flat(rgb) for rgb in (*PALETTE.values(), *TINTS.values(), (128, 128, 128))]
    flats += [_flat((0, 0, 0)), _flat((255, 255, 255))]
    noise = rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    smooth = scipy_ndimage.gaussian_filter(noise.astype(float), (0, 4, 4, 0))
    smooth = _uint8((smooth - 127.5) * 12 + 127.5)
    ramp = np.linspace(0, 255, 64).reshape(1, 1, 64, 1) * np.ones((1, 64, 1, 3))
    return np.concatenate([*flats, noise, smooth, _uint8(ramp), _everything()])


def test_noise_gray_and_all_colors_at_once_never_pass() -> None:
    junk = _junk()
    for caption in ("a circle", "a red square", "three stars", "a star above a cross"):
        verdict = verify(junk, [caption] * len(junk))
        assert not verdict.passed.any()
        assert verdict.score.max() <= 0.5


def test_empty_pictures_alone_are_judged() -> None:
    blank = np.stack([np.full((64, 64, 3), level, np.uint8) for level in (0, 128, 255)])
    verdict = verify(blank, ["a red circle"] * 3)
    assert not verdict.passed.any() and not verdict.parts["count"].any()
    assert (verdict.score == 0).all()


def test_a_crowd_of_every_object_never_passes() -> None:
    singles = sample_scenes(np.random.default_rng(6), 60, split="all", tasks=["colors"])
    crowd = render(singles).min(axis=0, keepdims=True)
    verdict = verify(np.repeat(crowd, len(singles), axis=0), captions(singles))
    assert not verdict.passed.any()


def test_an_object_too_many_fails_the_count_alone() -> None:
    scenes = sample_scenes(np.random.default_rng(7), 300, split="all", tasks=["color_attribution"])
    named = [caption.split(" and ")[0] for caption in captions(scenes)]
    verdict = verify(render(scenes), named)
    assert not verdict.passed.any()
    assert not verdict.parts["count"].any()
    for part in ("shape", "color", "size", "position", "background"):
        assert verdict.parts[part].mean() > 0.99
    np.testing.assert_allclose(np.median(verdict.score), 0.7 - 0.1, atol=1e-6)


def _pairs(n: int) -> tuple[Scenes, list[str]]:
    """Scenes of two objects, and captions that name the first one alone."""
    rng = np.random.default_rng(13)
    scenes = sample_scenes(rng, n, split="all", tasks=["color_attribution"])
    return scenes, [caption.split(" and ")[0] for caption in captions(scenes)]


def _without(scenes: Scenes, *slots: int) -> np.ndarray:
    present = scenes.present & ~np.isin(np.arange(3), slots)
    return render(dataclasses.replace(scenes, present=present)).astype(float)


@pytest.mark.parametrize("opacity", [0.25, 0.35])
def test_a_faint_object_too_many_is_seen(opacity: float) -> None:
    scenes, named = _pairs(200)
    alone, both = _without(scenes, 1), _without(scenes)
    assert verify(_uint8(alone), named).passed.all()
    verdict = verify(_uint8(alone + opacity * (both - alone)), named)
    assert not verdict.passed.any() and not verdict.parts["count"].any()


def test_a_white_object_too_many_is_seen() -> None:
    scenes, named = _pairs(200)
    second = np.abs(_without(scenes, 0) - _without(scenes, 0, 1)).max(axis=3, keepdims=True) > 60
    white = _uint8(np.where(second, 255, _without(scenes, 1)))
    assert not verify(white, named).passed.any()


def test_an_object_within_another_is_seen() -> None:
    scenes, named = _pairs(800)
    nested = np.flatnonzero((scenes.size[:, 0] == 1) & (scenes.size[:, 1] == 0))
    scenes, named = scenes.take(nested), [named[i] for i in nested]
    second = np.arange(3) == 1
    scenes = dataclasses.replace(
        scenes,
        x=np.where(second, scenes.x[:, :1], scenes.x),
        y=np.where(second, scenes.y[:, :1], scenes.y),
    )
    assert len(named) > 150
    assert not verify(render(scenes), named).passed.any()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("red", "blue"), "color"),
        (("circle", "triangle"), "shape"),
        (("large", "small"), "size"),
        (("mint", "sky"), "background"),
    ],
)
def test_the_part_that_is_wrong_is_the_part_that_fails(change: tuple[str, str], part: str) -> None:
    caption = "a large red circle on a mint background"
    rng = np.random.default_rng(8)
    scenes = sample_scenes(rng, 4000, split="all", tasks=["colors"])
    fits = (scenes.shape[:, 0] == SHAPES.index("circle")) & (scenes.size[:, 0] == 1)
    fits &= scenes.color[:, 0] == COLORS.index("red")
    fits &= scenes.background == BACKGROUNDS.index("mint")
    images = render(scenes.take(fits))
    assert len(images) >= 3
    assert verify(images, [caption] * len(images)).passed.all()
    verdict = verify(images, [caption.replace(*change)] * len(images))
    assert {name for name in PARTS if not verdict.parts[name].all()} == {part}
    np.testing.assert_allclose(verdict.score, 0.7 * 3 / 4, rtol=1e-5)


def test_a_reversed_relation_fails_the_position_alone() -> None:
    scenes = sample_scenes(np.random.default_rng(9), 200, split="all", tasks=["position"])
    other = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for relation, opposite in other.items():
        texts = captions(scenes)
        chosen = [i for i, text in enumerate(texts) if f" {relation} " in text]
        false = [texts[i].replace(f" {relation} ", f" {opposite} ") for i in chosen]
        verdict = verify(render(scenes)[chosen], false)
        assert not verdict.passed.any()
        assert {name for name in PARTS if not verdict.parts[name].any()} == {"position"}


def test_partial_credit_grows_with_what_is_right() -> None:
    scenes = sample_scenes(np.random.default_rng(10), 3000, split="all", tasks=["colors"])
    red_circle = (scenes.shape[:, 0] == 0) & (scenes.color[:, 0] == 0)
    images = render(scenes.take(red_circle))[:5]
    texts = ["a red circle", "a blue circle", "a blue star", "a blue star and a green square"]
    scores = [float(verify(images, [text] * 5).score.mean()) for text in texts]
    assert scores[0] == 1.0
    np.testing.assert_allclose(scores[1:], [0.35, 0.0, 0.0], atol=1e-6)


def test_what_is_asked_follows_the_caption() -> None:
    images = IMAGES[:3]
    texts = ["a circle", "a small red star above a blue cross", "two stars on a sky background"]
    asked = verify(images, texts).asked
    assert asked["color"].tolist() == [False, True, False]
    assert asked["size"].tolist() == [False, True, False]
    assert asked["position"].tolist() == [False, True, False]
    assert asked["background"].tolist() == [False, False, True]
    assert asked["count"].all()


def test_verdicts_do_not_depend_on_the_batch() -> None:
    together = verify(IMAGES[:70], CAPTIONS[:70])
    for i in (0, 31, 32, 69):
        alone = verify(IMAGES[i : i + 1], CAPTIONS[i : i + 1])
        assert alone.passed[0] == together.passed[i]
        assert alone.score[0] == together.score[i]


def test_components_agree_with_scipy() -> None:
    rng = np.random.default_rng(11)
    masks = scipy_ndimage.gaussian_filter(rng.normal(size=(6, 48, 48)), (0, 1.5, 1.5)) > 0
    labels = label_components(masks)
    for mask, ours in zip(masks, labels, strict=True):
        theirs, count = scipy_ndimage.label(mask)
        assert len(np.unique(ours[mask])) == count
        # The same partition: each of our regions lies in one of theirs.
        assert len(set(zip(ours[mask].tolist(), theirs[mask].tolist(), strict=True))) == count
        assert (ours[~mask] == -1).all()


def test_a_maze_is_labeled_as_one_component() -> None:
    spiral = np.zeros((1, 33, 33), bool)
    spiral[0, ::2] = True
    spiral[0, 1::4, -1] = True
    spiral[0, 3::4, 0] = True
    assert len(np.unique(label_components(spiral)[spiral])) == 1


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (1, 128, 128, 3), (64, 64, 3), (1, 64, 64, 4)])
def test_other_picture_sizes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="64, 64, 3"):
        detect(np.zeros(shape, np.uint8))


def test_floats_foreign_captions_and_wrong_counts_are_refused() -> None:
    with pytest.raises(UsageError, match="float32"):
        verify(IMAGES[:1].astype(np.float32), ["a circle"])
    with pytest.raises(UsageError, match="did you mean 'circle'"):
        verify(IMAGES[:1], ["a cirkle"])
    with pytest.raises(UsageError, match="2 images and 1 captions"):
        verify(IMAGES[:2], ["a circle"])


def test_the_reward_is_exact_or_gives_partial_credit() -> None:
    path = str(resource_path("rewards", "shapes.py"))
    metadata = [{}] * 40
    wrong = CAPTIONS[1:41]
    soft = load_reward(path).function(IMAGES[:40], wrong, metadata)
    exact = load_reward(path, {"partial_credit": "false"}).function(IMAGES[:40], wrong, metadata)
    assert soft.dtype == exact.dtype == np.float32
    assert set(np.unique(exact)) <= {0.0, 1.0}
    np.testing.assert_array_equal(exact, (soft == 1).astype(np.float32))
    assert len(np.unique(soft)) > 3
    alone = load_reward(str(resource_path("rewards", "shapes_exact.py")))
    np.testing.assert_array_equal(alone.function(IMAGES[:40], wrong, metadata), exact)
    assert alone.function(IMAGES[:40], CAPTIONS[:40], metadata).mean() >= 0.95


def test_every_task_is_judged_equally_well() -> None:
    for task in TASKS:
        scenes = sample_scenes(np.random.default_rng(12), 120, split="heldout", tasks=[task])
        assert verify(render(scenes), captions(scenes)).passed.mean() >= 0.99, task
