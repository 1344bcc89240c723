import numpy as np
import pytest

from diffusion_grpo.commands.common import Talk
from diffusion_grpo.comparison import chosen_evaluations, comparison_grid
from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery

GREEN, RED = (17, 115, 75), (179, 55, 42)


def flat(value, count=2):
    return np.full((count, 128, 128, 3), value, np.uint8)


def has(page, color):
    return bool((np.asarray(page) == color).all(axis=-1).any())


def test_models_are_columns_and_differences_are_colored():
    scores = [np.array([0.5, 0.5]), np.array([0.7, 0.5]), np.array([0.5, 0.5])]
    models = [flat(10), flat(60), flat(110)]
    page = comparison_grid(models, ["base", "a", "b"], ["one", "two"], scores=scores)
    pixels = np.asarray(page)
    lefts = [np.argwhere((pixels == shade).all(axis=-1))[:, 1].min() for shade in (10, 60, 110)]
    assert lefts == sorted(lefts) and lefts[1] - lefts[0] >= 128
    assert has(page, GREEN) and not has(page, RED)
    scores[2] = np.array([0.4, 0.5])
    assert has(comparison_grid(models, ["base", "a", "b"], ["one", "two"], scores=scores), RED)
    assert not has(comparison_grid(models, ["base", "a", "b"], ["one", "two"]), GREEN)


def test_what_is_right_or_wrong_is_ticked_or_crossed():
    models, labels, captions = [flat(10), flat(60)], ["base", "a"], ["one", "two"]
    right, wrong = np.ones(2), np.zeros(2)
    pages = [
        comparison_grid(models, labels, captions, scores=scores)
        for scores in ([right, right], [wrong, wrong], [wrong, right])
    ]
    assert [(has(page, GREEN), has(page, RED)) for page in pages] == [
        (True, False), (False, True), (True, True)]  # fmt: skip
    # Crosses have twice the strokes, and are no recolored ticks.
    ticks, crosses = (
        (np.asarray(p) == c).all(axis=-1) for p, c in zip(pages, (GREEN, RED), strict=False)
    )
    assert ticks.any() and crosses.any() and (ticks != crosses).any()


def test_pictures_of_another_size_are_enlarged_to_fit_beside_the_others():
    wide = np.full((1, 128, 256, 3), 60, np.uint8)  # twice as wide: white above and below
    page = np.asarray(comparison_grid([np.full((1, 512, 512, 3), 10, np.uint8), wide], "ab", "c"))
    for shade, width, height in ((10, 512, 512), (60, 512, 256)):
        places = np.argwhere((page == shade).all(axis=-1))
        assert (
            tuple(np.ptp(places, axis=0) + 1) == (height, width) and len(places) == height * width
        )


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected the same number"):
        comparison_grid([flat(1), flat(1, 3)], ["a", "b"], ["one", "two"])


def test_evaluations_are_chosen_evenly_with_both_ends(tmp_path):
    gallery = Gallery(tmp_path)
    with pytest.raises(UsageError, match="0 recorded evaluations; expected two or more"):
        chosen_evaluations(gallery, 4)
    for done in range(0, 110, 10):
        gallery.add("evaluation", done, flat(1, 1), ["a"], {"total": np.ones(1)})
    assert [e.iteration for e in chosen_evaluations(gallery, 3)] == [0, 50, 100]
    assert len(chosen_evaluations(gallery, 99)) == 11


def test_progress_of_a_command_is_for_terminals_and_for_verbose(capsys):
    for talk, shown in ((Talk(), False), (Talk(quiet=True), False), (Talk(verbose=True), True)):
        with talk.progress("images", 4) as count:
            count(2)
            count(4)
        text = capsys.readouterr().err
        assert ("images 2/4" in text and "4 in " in text) == shown
        assert bool(text) == shown


def test_pictures_of_a_row_keep_their_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (1, 128, 130, 3), dtype=np.uint8)
    page = np.asarray(comparison_grid([picture, picture], ["a", "b"], ["one"]))
    corners = np.argwhere((page == picture[0, 0, 0]).all(axis=-1))
    found = [(y, x) for y, x in corners if (page[y : y + 128, x : x + 130] == picture[0]).all()]
    assert len(found) == 2 and found[0][0] == found[1][0]


def test_a_long_name_stays_above_its_own_column():
    models = [flat(10), flat(60)]
    pages = [
        np.asarray(comparison_grid(models, [name, "b"], ["one", "two"])).astype(int)
        for name in ("a", "runs/of/a/long/name/that/is/wider/than/the/picture@base")
    ]
    second = np.argwhere((pages[1] == 60).all(axis=-1))
    top, left = second[:, 0].min(), second[:, 1].min()
    assert top > np.argwhere((pages[0] == 60).all(axis=-1))[:, 0].min()  # of more than one line
    between = pages[1][: top - 2, left - 4 : left - 1]
    assert (between == 255).all()
