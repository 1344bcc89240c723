import numpy as np
import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.gallery import Gallery, contact_sheet


def flat(values, height=40, width=60):
    return np.broadcast_to(
        np.array(values, np.uint8).reshape(-1, 1, 1, 1), (len(values), height, width, 3)
    ).copy()


def test_tiles_come_back_in_order_and_reduced(tmp_path):
    gallery = Gallery(tmp_path)
    values = [10, 60, 110, 160, 210]
    images = flat(values, 100, 150)
    gallery.add("rollout", 3, images, list("abcde"), {"total": np.arange(5.0)}, group=5)
    (entry,) = gallery.entries("rollout")
    assert entry.iteration == 3 and entry.prompts == list("abcde") and entry.group == 5
    assert entry.tile == (64, 43) and entry.columns == 3  # the longest side is 64 pixels
    assert entry.scores == {"total": [0, 1, 2, 3, 4]}
    tiles = gallery.images(entry)
    assert tiles.shape == (5, 43, 64, 3)
    assert np.abs(tiles[:, 10:30, 10:50].mean(axis=(1, 2, 3)) - values).max() < 3


def test_small_images_are_not_enlarged():
    sheet, columns, tile = contact_sheet(flat([1, 2]), 64)
    assert (sheet.size, columns, tile) == ((120, 40), 2, (60, 40))


@pytest.mark.parametrize("count", [4096, 4100])
def test_a_sheet_of_thousands_is_one_that_can_be_read_again(count, tmp_path):
    """WebP ends at 16383 pixels a side; Pillow warns of more than 9459² of them, an error here."""
    images = np.zeros((count, 1, 300, 3), np.uint8)  # wide and flat, so that the test is quick
    images[-1] = 200
    gallery = Gallery(tmp_path)
    gallery.add("evaluation", 0, images, ["a"] * count, {"total": np.zeros(count)})
    (entry,) = gallery.entries("evaluation")
    columns = int(np.ceil(count**0.5))
    assert entry.columns == columns and entry.tile == (9459 // columns, 1)
    tiles = gallery.images(entry)
    assert tiles.shape == (count, 1, 9459 // columns, 3)
    assert tiles[-1].mean() > 150 and tiles[0].mean() < 20


@pytest.mark.parametrize("shape", [(300, 300), (7, 300), (300, 7), (40, 40)])
def test_no_side_of_a_sheet_is_longer_than_can_be_kept(shape, monkeypatch):
    monkeypatch.setattr("diffusion_grpo.gallery.LONGEST_SIDE", 500)
    for count in (1, 2, 5, 12, 13, 150):
        sheet, columns, tile = contact_sheet(flat([0] * count, *shape), 256)
        assert max(sheet.size) <= 500 and sheet.width == columns * tile[0]
        if count == 1:  # as large as asked for while there is room
            assert max(tile) == min(256, max(shape))


def test_prompts_may_hold_any_character(tmp_path):
    prompts = ["b\u2028c", "d\u2029e", "cut\u0085", "猫\n犬"]
    gallery = Gallery(tmp_path)
    for done in (0, 5):
        gallery.add("evaluation", done, flat([1] * 4), prompts, {"total": np.arange(4.0)})
    assert [entry.prompts for entry in gallery.entries("evaluation")] == [prompts] * 2
    index = gallery.folder / "evaluations.jsonl"
    # a process that dies may write a part of a character
    line = index.read_bytes().split(b"\n")[0]
    index.write_bytes(index.read_bytes() + line[: line.index("猫".encode()) + 1])
    assert [entry.iteration for entry in gallery.entries("evaluation")] == [0, 5]
    Gallery(tmp_path).truncate_after(5)
    assert index.read_bytes().count(b"\n") == 2


def test_what_was_recorded_is_not_read_again_at_every_iteration(tmp_path, monkeypatch):
    gallery = Gallery(tmp_path)
    reads = []
    entries = Gallery.entries
    monkeypatch.setattr(Gallery, "entries", lambda *a: reads.append(a) or entries(*a))
    for iteration in range(5):
        gallery.add("rollout", iteration, flat([1]), ["a"], {"total": np.zeros(1)})
    assert len(reads) == 1
    gallery.add("rollout", 2, flat([1]), ["b"], {"total": np.zeros(1)})  # goes back
    assert [entry.prompts for entry in entries(gallery, "rollout")] == [["a"], ["a"], ["b"]]
    gallery.truncate_after(2)
    gallery.add("rollout", 2, flat([1]), ["c"], {"total": np.zeros(1)})
    assert [entry.prompts for entry in entries(gallery, "rollout")] == [["a"], ["a"], ["c"]]


def test_a_run_that_goes_back_replaces_what_came_after(tmp_path):
    gallery = Gallery(tmp_path)
    for done in (0, 2, 4):
        gallery.add("evaluation", done, flat([done]), ["a"], {"total": np.ones(1)})
        gallery.add("rollout", done, flat([done]), ["a"], {"total": np.ones(1)})
    gallery.truncate_after(2)
    assert [entry.iteration for entry in gallery.entries("evaluation")] == [0, 2]
    assert [entry.iteration for entry in gallery.entries("rollout")] == [0]
    gallery.add("evaluation", 2, flat([99]), ["b"], {"total": np.ones(1)})
    assert [entry.prompts for entry in gallery.entries("evaluation")] == [["a"], ["b"]]


def test_a_line_cut_short_is_left_out_and_a_missing_sheet_is_named(tmp_path):
    gallery = Gallery(tmp_path)
    gallery.add("rollout", 0, flat([5]), ["a"], {"total": np.ones(1)})
    with (tmp_path / "gallery" / "rollouts.jsonl").open("a") as file:
        file.write('{"iteration": 1, "she')
    (entry,) = gallery.entries("rollout")
    (tmp_path / "gallery" / entry.sheet).unlink()
    with pytest.raises(UsageError, match="no rollout_00000.webp"):
        gallery.images(entry)


def test_an_image_that_a_reward_failed_on_has_no_score(tmp_path):
    gallery = Gallery(tmp_path)
    scores = {"total": np.array([np.nan, 0.25], np.float32)}
    gallery.add("rollout", 0, flat([1, 2]), ["a", "b"], scores, advantages=np.array([np.nan, 0]))
    (entry,) = gallery.entries("rollout")
    assert entry.scores == {"total": [None, 0.25]} and entry.advantages == [None, 0.0]
    np.testing.assert_array_equal(entry.numbers("total"), [np.nan, 0.25])
    assert "NaN" not in (tmp_path / "gallery" / "rollouts.jsonl").read_text()
