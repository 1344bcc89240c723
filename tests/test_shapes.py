from pathlib import Path

import numpy as np
import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.resources import resource_path
from diffusion_grpo.shapes.captions import (
    VOCABULARY,
    ObjectSpec,
    Requirement,
    captions,
    describe,
    hard_negatives,
    metadata,
    parse,
    requirements,
    reverse,
    split_of,
)
from diffusion_grpo.shapes.prompt_lists import write_prompts
from diffusion_grpo.shapes.render import render, signed_distance
from diffusion_grpo.shapes.scenes import (
    COLORS,
    PALETTE,
    SHAPES,
    TASKS,
    TINTS,
    Scenes,
    sample_scenes,
    scene_batch,
)
from diffusion_grpo.shapes.tokenizer import write_tokenizer


def _one_object(shape: str, color: str, radius: float, x: float = 32.0, y: float = 32.0) -> Scenes:
    """A scene with a single object on gray, with fixed light and texture."""

    def slots(value: float, dtype: type) -> np.ndarray:
        return np.full((1, 3), value, dtype)

    return Scenes(
        task=np.array([TASKS.index("colors")], np.int8),
        shape=slots(SHAPES.index(shape), np.int8),
        color=slots(COLORS.index(color), np.int8),
        size=slots(int(radius > 9.5), np.int8),
        present=np.array([[True, False, False]]),
        x=slots(x, np.float32),
        y=slots(y, np.float32),
        radius=slots(radius, np.float32),
        relation=np.array([-1], np.int8),
        background=np.array([list(TINTS).index("gray")], np.int8),
        texture=np.zeros((1, 7), np.float32),
        say_size=np.array([False]),
        say_color=np.array([True]),
        say_background=np.array([False]),
    )


def test_a_picture_is_the_same_whatever_is_rendered_beside_it() -> None:
    scenes = scene_batch(3, 0, 64)
    alone = np.concatenate([render(scenes.take(slice(i, i + 1))) for i in range(64)])
    np.testing.assert_array_equal(render(scenes), alone)


@pytest.mark.parametrize("radius", [7.0, 9.3, 12.8])
def test_a_black_circle_covers_pi_r_squared_pixels(radius: float) -> None:
    image = render(_one_object("circle", "black", radius))[0].astype(float).mean(axis=-1)
    dark, light = image[32, 32], np.median(image)
    covered = np.clip((light - image) / (light - dark), 0, 1)
    # The contact shadow and the shading together weigh a few percent.
    inside = np.where(covered > 0.5, 1, 0).sum()
    assert inside == pytest.approx(np.pi * radius**2, rel=0.06)


def test_areas_of_all_shapes_agree_with_their_polygons() -> None:
    def polygon_area(points: np.ndarray) -> float:
        x, y = points.T
        return 0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))

    def star(tip: float, notch: float, tips: int) -> np.ndarray:
        angles = np.pi * np.arange(2 * tips) / tips
        radii = np.where(np.arange(2 * tips) % 2 == 0, tip, notch)
        return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)

    expected = {
        "circle": np.pi,
        "square": (2 * 0.88) ** 2,
        "triangle": polygon_area(star(1.28, 0.64, 3)),
        "star": polygon_area(star(1.25, 0.60, 5)),
        "cross": 2 * 2.04 * 0.72 - 0.72**2,
    }
    radius = np.full((1, 1), 40.0, np.float32)
    grid = np.arange(-64, 64, 0.25, dtype=np.float32) + np.float32(0.125)
    for shape in SHAPES:
        inside = signed_distance(shape, grid.reshape(1, -1), grid.reshape(-1, 1), radius) < 0
        assert inside.sum() / 16 / 40**2 == pytest.approx(expected[shape], rel=5e-3), shape


def test_a_triangle_points_up_and_a_star_has_its_tip_on_top() -> None:
    for shape in ("triangle", "star"):
        image = render(_one_object(shape, "black", 12.0))[0].mean(axis=-1)
        dark_rows = (image < 128).sum(axis=1)
        rows = np.flatnonzero(dark_rows)
        assert dark_rows[rows[0]] <= 3
        assert rows[0] == pytest.approx(32 - 12 * 1.27, abs=1.5)


def test_pictures_show_the_palette_color_and_the_tint() -> None:
    for color, rgb in PALETTE.items():
        image = render(_one_object("square", color, 11.0, x=20.0, y=40.0))[0].astype(float)
        center = image[37:43, 17:23].mean(axis=(0, 1))
        assert np.abs(center - rgb).max() < 14, color
        assert np.abs(image[:10, 40:].mean(axis=(0, 1)) - TINTS["gray"]).max() < 10


def test_palette_colors_are_far_from_each_other_and_from_every_background() -> None:
    colors, tints = (np.array(list(p.values()), float) for p in (PALETTE, TINTS))
    between = np.linalg.norm(colors.reshape(-1, 1, 3) - colors.reshape(1, -1, 3), axis=-1)
    assert between[np.triu_indices(len(colors), 1)].min() > 90
    assert np.linalg.norm(colors.reshape(-1, 1, 3) - tints.reshape(1, -1, 3), axis=-1).min() > 110


def test_objects_stay_inside_and_apart() -> None:
    scenes = sample_scenes(np.random.default_rng(0), 400, split="all")
    # Each object alone on its own canvas: darkened pixels of two objects never coincide or touch.
    grid = np.arange(64, dtype=np.float32) + np.float32(0.5)
    for i in range(len(scenes)):
        distances = [
            signed_distance(
                SHAPES[scenes.shape[i, k]],
                (grid - scenes.x[i, k]).reshape(1, -1),
                (grid - scenes.y[i, k]).reshape(-1, 1),
                scenes.radius[i, k].reshape(1, 1),
            )
            for k in np.flatnonzero(scenes.present[i])
        ]
        masks = [d < 0.5 for d in distances]
        assert np.sum(masks, axis=0).max() == 1
        for mask in masks:
            assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def test_stated_relations_are_true_and_clear() -> None:
    scenes = sample_scenes(np.random.default_rng(1), 500, tasks=["position"])
    dx, dy = (c[:, 1] - c[:, 0] for c in (scenes.x, scenes.y))
    axis = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}
    for i, requirement in enumerate(requirements(scenes)):
        assert requirement.relation is not None
        assert axis[requirement.relation][i] >= 14
        assert axis[requirement.relation][i] >= max(abs(dx[i]), abs(dy[i])) - 1e-4
    assert {r.relation for r in requirements(scenes)} == set(axis)


def test_captions_read_as_english() -> None:
    red, blue = ObjectSpec("circle", "red"), ObjectSpec("square", "blue")
    said = {
        Requirement("single_object", (ObjectSpec("circle"),)): "a circle",
        Requirement("colors", (ObjectSpec("star", "orange", None),)): "an orange star",
        Requirement("counting", (ObjectSpec("cross", "green", "small"),), 2): (
            "two small green crosses"
        ),
        Requirement("position", (red, blue), relation="left of"): (
            "a red circle left of a blue square"
        ),
        Requirement("color_attribution", (blue, red), background="mint"): (
            "a blue square and a red circle on a mint background"
        ),
    }
    for requirement, text in said.items():
        assert describe(requirement) == text
        assert parse(text) == requirement
    assert describe(reverse(parse("a star above a circle"))) == "a circle below a star"


def test_parse_is_the_inverse_of_describe() -> None:
    scenes = sample_scenes(np.random.default_rng(2), 2000, split="all")
    stated = requirements(scenes)
    assert [parse(describe(r)) for r in stated] == stated
    assert {r.task for r in stated} == set(TASKS)
    words = {word for r in stated for word in describe(r).split()}
    assert words == set(VOCABULARY)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a red cirle", "did you mean 'circle'"),
        ("a cat on the moon", "'cat'"),
        ("two circle", "circles"),
        ("a circle on a blue background", "unknown background 'blue'"),
        ("a circle and a red circle", "same shape"),
        ("two stars and a circle", "names too much"),
        ("", "cannot read ''"),
        ("a", "cannot read 'a'"),
        ("a red", "misplaced word 'red'"),
        ("a red small circle", "misplaced word 'small'"),
        ("a red circle beside a blue square", "unknown word 'beside'"),
    ],
)
def test_a_foreign_caption_is_refused_by_name(caption: str, named: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(caption)
    assert named in str(error.value)


def test_splits_share_no_combination_of_attributes() -> None:
    seen: dict[str, set[object]] = {}
    for split in ("train", "heldout"):
        scenes = sample_scenes(np.random.default_rng(3), 1500, split=split)
        stated = requirements(scenes)
        # The objects without order or relation, so that no rewording moves between the splits.
        seen[split] = {(frozenset(r.objects), r.count, r.background) for r in stated}
        assert {split_of(describe(r)) for r in stated} == {split}
        assert {split_of(describe(reverse(r))) for r in stated if len(r.objects) == 2} == {split}
    assert not seen["train"] & seen["heldout"]


def test_a_tenth_of_the_captions_is_held_out() -> None:
    scenes = sample_scenes(np.random.default_rng(4), 6000, split="all", tasks=TASKS[1:])
    texts = set(captions(scenes))
    share = sum(split_of(text) == "heldout" for text in texts) / len(texts)
    assert 0.075 < share < 0.125


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first = scene_batch(5, 7, 32)
    np.testing.assert_array_equal(render(first), render(scene_batch(5, 7, 32)))
    assert captions(first) != captions(scene_batch(5, 8, 32))
    assert captions(first) != captions(scene_batch(6, 7, 32))


def test_hard_negatives_are_false_captions_near_the_truth() -> None:
    scenes = sample_scenes(np.random.default_rng(6), 200)
    negatives = hard_negatives(scenes, np.random.default_rng(7), 5, split="train")
    for truth, false in zip(requirements(scenes), negatives, strict=True):
        assert len(set(false)) == 5
        equivalents = {describe(truth)}
        if len(truth.objects) == 2:
            equivalents.add(describe(reverse(truth)))
        assert not equivalents & set(false)
        assert all(split_of(text) == "train" for text in false)


def test_negatives_of_a_relation_include_its_opposite() -> None:
    scenes = sample_scenes(np.random.default_rng(8), 50, tasks=["position"])
    flip = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    found = 0
    for truth, false in zip(
        requirements(scenes), hard_negatives(scenes, np.random.default_rng(9), 4), strict=True
    ):
        assert truth.relation is not None
        opposite = Requirement(truth.task, truth.objects, relation=flip[truth.relation])
        found += bool({describe(opposite), describe(reverse(opposite))} & set(false))
    assert found > 35


def test_unknown_task_or_split_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="did you mean 'counting'"):
        sample_scenes(rng, 1, tasks=["countin"])
    assert len(sample_scenes(rng, 0)) == 0


def test_prompt_files_are_what_the_code_writes(tmp_path: Path) -> None:
    for path in write_prompts(tmp_path):
        assert path.read_bytes() == resource_path("prompts", path.name).read_bytes(), path.name


def test_prompt_files_keep_the_splits_and_cover_the_tasks() -> None:
    for name, split, least in (("shapes", "train", 300), ("shapes_heldout", "heldout", 320)):
        prompts = load_prompts(str(resource_path("prompts", f"{name}.jsonl")))
        texts = [prompt.text for prompt in prompts]
        assert len(set(texts)) == len(texts) >= least
        assert {split_of(text) for text in texts} == {split}
        tasks = [parse(text).task for text in texts]
        assert min(tasks.count(task) for task in TASKS) >= 30
        plain = resource_path("prompts", f"{name}.txt").read_text().splitlines()
        assert plain == texts


def test_metadata_states_the_requirement() -> None:
    record = metadata("two small stars on a sky background")
    assert record["task"] == "counting"
    assert record["background"] == "sky"
    assert record["objects"] == [{"shape": "star", "color": None, "size": "small", "count": 2}]


def test_every_word_is_one_token_and_the_end_token_is_last(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    size = write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 16
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == size - 1
    scenes = sample_scenes(np.random.default_rng(10), 300, split="all")
    for text in captions(scenes):
        ids = tokenizer(text, padding="max_length", max_length=16, truncation=True).input_ids
        words = len(text.split())
        assert len(ids) == 16
        assert ids[0] == tokenizer.bos_token_id
        assert ids.index(tokenizer.eos_token_id) == words + 1
        assert tokenizer.decode(ids[1 : words + 1]) == text


def test_the_tokenizer_loses_no_text(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    write_tokenizer(tmp_path, model_max_length=64)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    text = "ein häuschen 漢字 zzz"
    ids = tokenizer(text).input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).strip() == text
