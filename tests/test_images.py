import json

import numpy as np
import pytest
from PIL import Image

from diffusion_grpo.errors import UsageError
from diffusion_grpo.grids import before_after_grid, image_grid
from diffusion_grpo.images import check_image_path, save_animation, save_image, to_uint8


def noise(count: int, height: int = 64, width: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def contains(page: Image.Image, picture: np.ndarray) -> bool:
    """Whether a picture occurs, pixel for pixel, anywhere in a page."""
    pixels = np.asarray(page)
    height, width, _ = picture.shape
    corners = np.argwhere((pixels == picture[0, 0]).all(axis=-1))
    return any((pixels[y : y + height, x : x + width] == picture).all() for y, x in corners)


def ink_below(page: Image.Image, top: int) -> bool:
    return bool((np.asarray(page)[top:] < 128).any())


def test_every_8_bit_value_survives_the_way_through_float() -> None:
    values = np.arange(256, dtype=np.uint8)
    for dtype in (np.float32, np.float64):
        np.testing.assert_array_equal(to_uint8(values.astype(dtype) / dtype(255)), values)


def test_values_are_clipped_and_rounded_to_the_nearest() -> None:
    values = np.array([-0.5, 0.0, 0.49 / 255, 0.51 / 255, 100.6 / 255, 1.0, 7.0], np.float32)
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 1, 101, 255, 255])


def test_half_precision_is_scaled_in_float32() -> None:
    values = np.linspace(0, 1, 999).astype(np.float16)
    expected = np.rint(values.astype(np.float64) * 255)
    np.testing.assert_array_equal(to_uint8(values), expected)


def test_an_image_that_is_not_finite_is_named() -> None:
    images = np.zeros((4, 2, 2, 3), np.float32)
    images[2, 1, 0, 1] = np.nan
    with pytest.raises(ValueError, match="image 2 holds NaN or infinity"):
        to_uint8(images)


def test_integers_are_not_taken_for_images_in_0_to_1() -> None:
    with pytest.raises(ValueError, match=r"dtype uint8, expected floating in \[0, 1\]"):
        to_uint8(noise(1))


def test_small_images_are_shown_at_128_pixels_and_large_ones_as_they_are() -> None:
    small = noise(2)
    page = image_grid(small, columns=2, resample="nearest")
    for image in small:
        assert contains(page, image.repeat(2, axis=0).repeat(2, axis=1))
    large = noise(1, 130, 150)
    assert contains(image_grid(large), large[0])
    tiny = noise(1, 48, 60)  # the shorter side decides: a factor of 3
    page = image_grid(tiny, resample="nearest")
    assert contains(page, tiny[0].repeat(3, axis=0).repeat(3, axis=1))


def test_the_size_of_a_grid_grows_by_cells() -> None:
    def size(count: int, columns: int) -> tuple[int, int]:
        return image_grid(noise(count, 128, 128), columns=columns).size

    one, wide, tall = size(1, 1), size(3, 3), size(3, 1)
    assert one[0] >= 128 and one[1] >= 128
    assert wide[1] == one[1] and wide[0] >= one[0] + 2 * 128
    assert tall[0] == one[0] and tall[1] >= one[1] + 2 * 128
    assert size(9, 3)[0] == wide[0]
    assert image_grid(noise(9)).size == image_grid(noise(9), columns=3).size


def test_images_lie_row_by_row_in_order() -> None:
    shades = np.array([40, 80, 120, 160, 200, 240], np.uint8)
    images = np.broadcast_to(shades.reshape(6, 1, 1, 1), (6, 128, 128, 3)).copy()
    pixels = np.asarray(image_grid(images, columns=3))
    corners = {int(s): np.argwhere((pixels == s).all(axis=-1))[0] for s in shades}
    order = sorted(corners, key=lambda shade: tuple(corners[shade]))
    assert order == shades.tolist()
    assert corners[40][0] == corners[120][0] < corners[160][0]


def test_a_caption_is_drawn_under_its_row_or_its_cell() -> None:
    images = np.full((4, 128, 128, 3), 255, np.uint8)
    plain = image_grid(images, columns=2)
    assert not ink_below(plain, 0)
    rows = image_grid(images, ["a red circle", "a blue square"], columns=2)
    assert rows.height > plain.height and rows.width == plain.width
    assert ink_below(rows, 128 + 20)
    cells = image_grid(images, ["one", "two", "three", "four"], columns=2)
    assert cells.height > plain.height
    # Without columns, as many captions as rows decide the columns.
    assert image_grid(images, ["a red circle", "a blue square"]).size == rows.size


def test_a_long_caption_is_wrapped_within_the_page_and_cut_at_three_lines() -> None:
    image = np.full((1, 128, 128, 3), 255, np.uint8)
    heights = [
        image_grid(image, ["word " * count], columns=1).height for count in (1, 6, 12, 40, 400)
    ]
    assert heights[0] < heights[1] < heights[3] == heights[4]
    page = np.asarray(
        image_grid(
            image,
            [
                "word " * 400,
            ][:1],
            columns=1,
        )
    )
    assert (page[:, -15:] == 255).all() and (page[-10:] == 255).all()
    unbroken = np.asarray(image_grid(image, ["w" * 400], columns=1))
    assert (unbroken[:, -15:] == 255).all()


def test_captions_that_fit_neither_rows_nor_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="3 captions for 4 images in 2 rows"):
        image_grid(noise(4), ["a", "b", "c"], columns=2)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.float32), noise(2)[..., :1], noise(1)[0], noise(0)]
)
def test_what_is_not_a_batch_of_8_bit_images_is_refused(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\]"):
        image_grid(images)


def test_before_is_left_of_after_and_prompts_keep_their_order() -> None:
    before = np.full((2, 128, 128, 3), 10, np.uint8)
    after = np.full((2, 128, 128, 3), 20, np.uint8)
    before[1], after[1] = 50, 60
    pixels = np.asarray(before_after_grid(before, after, ["a circle", "a square"]))
    places = {s: np.argwhere((pixels == s).all(axis=-1))[0] for s in (10, 20, 50, 60)}
    assert places[10][0] == places[20][0] and places[10][1] + 128 < places[20][1]
    assert places[50][0] == places[60][0] and places[50][1] + 128 < places[60][1]
    assert tuple(places[10]) < tuple(places[50])


def test_groups_of_a_prompt_share_one_caption() -> None:
    before, after = noise(8, 128, 128, 1), noise(8, 128, 128, 2)
    page = before_after_grid(before, after, ["a circle", "a square"])
    assert page.width >= 8 * 128 and 2 * 128 < page.height < 4 * 128
    for image in (before[0], before[7], after[0], after[7]):
        assert contains(page, image)


def test_scores_are_written_under_the_images_and_only_the_title_above() -> None:
    before, after = noise(2, seed=1), noise(2, seed=2)
    plain = before_after_grid(before, after, ["a", "b"])
    scored = before_after_grid(
        before,
        after,
        ["a", "b"],
        scores_before=np.array([0.1, 0.2]),
        scores_after=np.array([0.3, 0.4]),
    )
    titled = before_after_grid(before, after, ["a", "b"], title="clip")
    assert plain.height < scored.height < titled.height
    # The head of the page is that of the page without scores: no mean of a part stands there.
    top = 20 + 8  # the margin and some of the line "before … after"
    assert (np.asarray(scored)[:top] == np.asarray(plain)[:top]).all()


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected the same"):
        before_after_grid(noise(2), noise(3), ["a"])
    with pytest.raises(ValueError, match="3 images and 2 captions"):
        before_after_grid(noise(3), noise(3), ["a", "b"])
    with pytest.raises(ValueError, match=r"scores have shape \(3,\), expected \(2,\)"):
        before_after_grid(noise(2), noise(2), ["a", "b"], scores_after=np.zeros(3))


def test_a_png_carries_its_metadata(tmp_path) -> None:
    image = Image.fromarray(noise(1)[0])
    metadata = {"prompt": "a circle", "seed": 7, "config": {"eta": 1.0}, "note": "圆形"}
    save_image(tmp_path / "grid.png", image, metadata)
    with Image.open(tmp_path / "grid.png") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
        text = read.text  # pyright: ignore[reportAttributeAccessIssue]
    assert text == {"prompt": "a circle", "seed": "7", "config": '{"eta": 1.0}', "note": "圆形"}
    assert b"tEXtprompt\x00a circle" in (tmp_path / "grid.png").read_bytes()


def test_a_path_that_cannot_be_written_is_refused_before_any_work(tmp_path) -> None:
    assert check_image_path(tmp_path / "new.png") == tmp_path / "new.png"
    with pytest.raises(UsageError, match="does not end in one of .png"):
        check_image_path(tmp_path / "grid.gif")
    with pytest.raises(UsageError, match="missing' does not exist: create it first"):
        check_image_path(tmp_path / "missing" / "grid.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file' is not a folder"):
        check_image_path(tmp_path / "file" / "grid.png")
    with pytest.raises(UsageError, match="is a directory"):
        check_image_path(tmp_path)


def test_a_keyword_that_png_does_not_admit_is_refused(tmp_path) -> None:
    for key in ("", "k" * 80, " prompt"):
        with pytest.raises(ValueError, match="PNG keyword"):
            save_image(tmp_path / "grid.png", Image.new("RGB", (2, 2)), {key: "x"})
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("suffix", [".webp", ".jpg", ".jpeg"])
def test_webp_and_jpeg_carry_their_metadata_too(tmp_path, suffix) -> None:
    image = Image.fromarray(noise(1)[0])
    save_image(tmp_path / f"grid{suffix}", image, {"prompt": "圆形", "seed": 7})
    with Image.open(tmp_path / f"grid{suffix}") as read:
        assert read.size == image.size and read.format in ("WEBP", "JPEG")
        described = json.loads(read.getexif()[0x010E])
    assert described == {"prompt": "圆形", "seed": 7}


def test_a_jpeg_is_written_however_long_its_metadata_are(tmp_path) -> None:
    image = Image.fromarray(noise(1)[0])
    metadata = {"prompt": "猫" * 30_000, "negative": "b" * 50_000, "seed": 7}
    save_image(tmp_path / "grid.jpg", image, metadata)
    with Image.open(tmp_path / "grid.jpg") as read:
        described = json.loads(read.getexif()[0x010E])
    assert described["seed"] == 7
    for key, letter in (("prompt", "猫"), ("negative", "b")):
        assert set(described[key]) == {letter, "…"} and described[key][-1] == "…"
        assert len(described[key]) > 3_000
    save_image(tmp_path / "grid.webp", image, metadata)
    with Image.open(tmp_path / "grid.webp") as read:
        assert json.loads(read.getexif()[0x010E]) == metadata


def test_an_image_larger_than_its_format_holds_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"16384 x 2 pixels are more than WEBP holds \(16383\)"):
        save_image(tmp_path / "grid.webp", Image.new("RGB", (16384, 2)))


def test_an_animation_larger_than_webp_holds_is_refused(tmp_path) -> None:
    for size in ((16384, 2), (2, 16384)):
        with pytest.raises(
            UsageError, match=r"animation path .* more than WEBP holds \(16383\); sh"
        ):
            save_animation(tmp_path / "steps.webp", [Image.new("RGB", size)] * 2)
    assert not (tmp_path / "steps.webp").exists()


def test_cells_of_a_contact_sheet_are_reduced_and_text_has_the_size_asked_for() -> None:
    images = noise(6, 64, 96)
    small = image_grid(images, columns=3, max_size=32)
    assert 3 * 32 < small.width < 3 * 32 + 70
    heights = [image_grid(images, ["a"], columns=6, text_size=size).height for size in (10, 40)]
    assert heights[1] - heights[0] >= 30


def test_an_animation_shows_its_frames_forever_and_rests_on_the_last(tmp_path) -> None:
    frames = [Image.new("RGB", (40, 30), (shade, 90, 40)) for shade in (20, 120, 220)]
    save_animation(tmp_path / "steps.webp", frames, seconds=0.2, hold=1.0)
    with Image.open(tmp_path / "steps.webp") as read:
        assert read.n_frames == 3 and read.info["loop"] == 0
        read.seek(2)
        read.load()
        assert read.info["duration"] == 1000
        shown = np.asarray(read.convert("RGB"), float).mean(axis=(0, 1))
    assert np.abs(shown - (220, 90, 40)).max() < 6
    with pytest.raises(UsageError, match="ends in .webp"):
        save_animation(tmp_path / "steps.png", frames)
