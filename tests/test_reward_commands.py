"""`score`, `check-reward`, `serve-reward` and `list rewards`, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_grpo.cli import main
from diffusion_grpo.reward import RewardSet, list_rewards, load_reward

BRIGHT = """import numpy as np

def bright(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3)) + np.array([len(p) for p in prompts])
"""

BEST = """from diffusion_grpo.reward import of_group

@of_group
def best(images, prompts, metadata):
    levels = images.mean(axis=(1, 2, 3))
    return levels - levels.max()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three PNGs and a JPEG of two sizes, and files that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (
        ("b.png", (8, 8)),
        ("a.png", (8, 8)),
        ("c.PNG", (8, 12)),
        ("d.jpg", (8, 8)),
    ):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        kind = "JPEG" if name == "d.jpg" else "PNG"
        Image.fromarray(pixels).save(tmp_path / "pictures" / name, kind)
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    (tmp_path / "bright.py").write_text(BRIGHT)
    (tmp_path / "best.py").write_text(BEST)
    return tmp_path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_folder_is_scored_without_any_model(folder, capsys) -> None:
    (folder / "prompts.txt").write_text("a\nbb\nccc\ndddd\n")
    words = ["--reward", "bright.py", "brightness=-2", "--images", "pictures"]
    assert main(["score", *words, "--prompts", "prompts.txt"]) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    names = ["a.png", "b.png", "c.PNG", "d.jpg"]
    assert [Path(row["image"]).name for row in rows] == names
    assert [row["prompt"] for row in rows] == ["a", "bb", "ccc", "dddd"]
    for row in rows:
        image = pixels(folder / row["image"])
        assert row["bright"] == pytest.approx(image.mean() + len(row["prompt"]), rel=1e-6)
        gray = (image.mean(axis=(0, 1)) @ [0.2126, 0.7152, 0.0722]) / 255
        assert row["brightness"] == pytest.approx(gray, rel=1e-5)
        assert row["total"] == pytest.approx(row["bright"] - 2 * row["brightness"], rel=1e-6)
    printed = capsys.readouterr()
    assert "bright: mean" in printed.out and "4/4 images" in printed.err


def test_scores_of_groups_say_what_varies_within_a_prompt(folder, capsys) -> None:
    (folder / "plain").mkdir()
    for place, level in enumerate((10, 30, 50, 50)):
        Image.new("RGB", (8, 8), (level, level, level)).save(folder / "plain" / f"{place}.png")
    (folder / "bright.py").write_text(BRIGHT.partition(" + np")[0] + "\n")
    words = ["--reward", "bright.py", "--images", "plain", "--group-size", "2"]
    assert main(["score", *words]) == 0
    # variances within: 100 and 0, so 50 in the mean; of the means 20 and 50: 225
    assert (
        "within a prompt: std 7.0711, 18% of the variance; 1 of 2 prompts have equal scores"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["scores.csv", "scores.CSV"])
def test_scores_can_be_csv_and_prompts_can_name_their_images(folder, name) -> None:
    lines = [{"prompt": name, "image": f"elsewhere/{name}"} for name in ("d.jpg", "a.png", "x.png")]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = ["pictures/a.png", "pictures/d.jpg"]
    words = ["--reward", "bright.py", "--images", *images, "--prompts", "prompts.jsonl"]
    assert main(["score", *words, "--output", name]) == 0
    with open(folder / name, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["a.png", "d.jpg"]
    assert list(rows[0]) == ["image", "prompt", "bright", "total"]
    assert main(["score", *words, "pictures/b.png"]) == 2


def test_a_prompt_names_its_image_by_as_much_of_the_path_as_tells_it_apart(folder) -> None:
    for name in ("a", "b2"):
        (folder / name).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(folder / name / f"{number}.png")
    named = ["x/a/0.png", "b2/0.png", str(folder / "a" / "1.png"), "./b2/../b2/1.png"]
    lines = [{"prompt": f"{i}", "image": image} for i, image in enumerate(named)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--reward", "bright.py", "--images", "b2", "a", "--prompts", "prompts.jsonl"]
    assert main(["score", *words]) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(row["image"], row["prompt"]) for row in rows] == [
        ("b2/0.png", "1"),
        ("b2/1.png", "3"),
        ("a/0.png", "0"),
        ("a/1.png", "2"),
    ]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["c/a/0.png", "d/a/0.png", "b2/0.png"], "the image 'a/0.png' may be 'c/a/0.png' ('0') or"),
        (["x/0.png", "y/0.png"], "may be 'x/0.png' ('0') or 'y/0.png' ('1')"),
        (["b2/0.png", "a/0.png", "b2/0.png"], "may be 'b2/0.png' ('0') or 'b2/0.png' ('2')"),
        (["a/0.png"], "both 'b2/0.png' and 'a/0.png' may be the image 'a/0.png'"),
        (["z/0.png"], "both 'b2/0.png' and 'a/0.png' may be the image 'z/0.png'"),
        (["0.png"], None),  # names both as a whole: one prompt, drawn twice
        (["0.png", "a/0.png"], None),
        (["0.png", "x/a/0.png"], None),
    ],
)
def test_images_that_a_prompt_may_mean_alike_are_refused(folder, capsys, named, message) -> None:
    for name in ("a", "b2"):
        (folder / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / name / "0.png")
    lines = [{"prompt": f"{i}", "image": image} for i, image in enumerate(named)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--images", "b2/0.png", "a/0.png", "--prompts", "prompts.jsonl"]
    assert main(["score", "--reward", "bright.py", *words]) == (2 if message else 0)
    if message:
        assert message in capsys.readouterr().err and not (folder / "scores.jsonl").exists()
        return
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["0", "1" if len(named) > 1 else "0"]


def test_numbered_images_are_in_the_order_of_their_numbers(folder) -> None:
    (folder / "many").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8)).save(folder / "many" / f"{number}.png")
    (folder / "twelve.txt").write_text("".join(f"prompt {number}\n" for number in range(12)))
    words = ["--reward", "bright.py", "--images", "many", "--prompts", "twelve.txt"]
    assert main(["score", *words]) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(row["image"], row["prompt"]) for row in rows] == [
        (f"many/{number}.png", f"prompt {number}") for number in range(12)
    ]


def test_groups_are_compared_and_rewards_combined(folder) -> None:
    (folder / "one.txt").write_text("a\nb\n")
    images = [f"pictures/{name}" for name in ("a.png", "b.png", "d.jpg", "a.png")]
    words = ["--images", *images, "--prompts", "one.txt", "--group-size", "2"]
    reward = ["--reward", "best.py", "bright.py", "--combine", "min"]
    assert main(["score", *reward, *words]) == 0
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    levels = [pixels(folder / name).mean() for name in images]
    for start in (0, 2):
        for i in (start, start + 1):
            best = levels[i] - max(levels[start : start + 2])
            assert rows[i]["best"] == pytest.approx(best, abs=1e-4)
            assert rows[i]["total"] == pytest.approx(min(best, levels[i] + 1), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "bright.py", "--images", "nowhere"], "'nowhere': no such file or folder"),
        (["--reward", "bright.py", "--images", "."], "no .png, .jpg"),
        (["--reward", "bright.py", "--images", "pictures/notes.txt"], "notes.txt cannot be read"),
        (["--reward", "brite", "--images", "pictures"], "unknown reward 'brite'"),
        (["--reward", "best.py", "--images", "pictures"], "--group-size is 1, but reward 'best'"),
        (["--reward", "bright.py", "--images", "pictures", "--group-size", "3"], "4 images are no"),
        (
            ["--reward", "best.py", "--images", "pictures", "--group-size", "4"],
            "are a group, but not of one size",
        ),
        (
            ["--reward", "bright.py", "--images", "pictures", "--output", "scores.txt"],
            "does not end in .jsonl or .csv",
        ),
        (
            ["--reward", "bright.py", "--images", "pictures", "--output", "no/scores.csv"],
            "the folder 'no' does not exist",
        ),
        (
            ["--reward", "bright.py", "--images", "pictures", "--combine", "mim"],
            "did you mean 'min'",
        ),
        (
            ["--reward", "bright.py", "--images", "pictures", "--prompts", "three.txt"],
            "has 3 prompts for 4 images; expected 4 (one an image) or 1",
        ),
        (
            ["--reward", "bright.py", "--images", "pictures", "--prompts", "some.jsonl"],
            "1 of 2 name their image; expected all or none",
        ),
        (
            [
                *["--reward", "bright.py", "--images", "pictures", "--prompts", "four.txt"],
                *["--group-size", "2"],
            ],
            "have the prompts 'a' and 'b'; expected one prompt a group",
        ),
        (["--reward", "bright.py", "--images", "pictures", "--output", "x.csv"], "is a folder"),
        (["--rewards", "bright.py"], "--reward"),
    ],
)
def test_what_cannot_be_scored_is_told_with_code_2(folder, capsys, words, message) -> None:
    (folder / "three.txt").write_text("a\nb\nc\n")
    (folder / "four.txt").write_text("a\nb\nc\nd\n")
    (folder / "some.jsonl").write_text('{"prompt": "a", "image": "a.png"}\n{"prompt": "b"}\n')
    (folder / "x.csv").mkdir()
    assert main(["score", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "scores.jsonl").exists()


def test_a_reward_that_fails_exits_with_code_1(folder, capsys) -> None:
    (folder / "bad.py").write_text("def bad(images, prompts, metadata):\n    return None\n")
    assert main(["score", "--reward", "bad.py", "--images", "pictures/a.png"]) == 1
    assert "reward 'bad' returned None" in capsys.readouterr().err


def test_a_users_reward_is_checked(folder, capsys) -> None:
    assert main(["check-reward", "bright.py"]) == 0
    printed = capsys.readouterr().out
    assert "reward bright: of single images, on the host" in printed
    assert "8 images of 64x64: one finite number each" in printed
    assert "the contract is kept" in printed
    (folder / "bad.py").write_text(
        "def bad(images, prompts, metadata):\n    return images.mean(axis=(1, 2))\n"
    )
    assert main(["check-reward", "bad.py", "--size", "16"]) == 1
    printed = capsys.readouterr().out
    assert "returned shape (8, 3)" in printed and "the contract is broken" in printed
    for name in "efghijk":
        (folder / "pictures" / f"{name}.png").write_bytes((folder / "pictures/a.png").read_bytes())
    (folder / "pictures" / "c.PNG").unlink()
    assert main(["check-reward", "bright.py", "--images", "pictures"]) == 0
    assert "8 images of 8x8" in capsys.readouterr().out
    assert main(["check-reward", "bright.py", "--images", "pictures/a.png"]) == 2
    assert main(["check-reward", "brite"]) == 2


def test_the_rewards_are_listed(capsys) -> None:
    assert main(["list", "rewards"]) == 0
    printed = capsys.readouterr().out
    for name in list_rewards():
        assert f"\n{name} " in f"\n{printed}"
    for name in ("clip", "pickscore", "hpsv2", "aesthetic", "image_reward", "ocr", "vlm"):
        assert name in list_rewards()


def can_listen_on(host: str) -> bool:
    import socket

    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_in_a_process_of_its_own_scores_and_stops(folder, monkeypatch, host) -> None:
    if not can_listen_on(host):
        pytest.skip(f"this machine has no {host}")
    environment = os.environ | {"REWARD_SERVER_TOKEN": "secret"}
    command = [sys.executable, "-m", "diffusion_grpo", "serve-reward", "bright.py", "--port", "0"]
    command += ["--host", host]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            shown = f"[{host}]" if ":" in host else host
            assert line.startswith(f"serving reward bright at http://{shown}:")
            assert line.endswith("(token of REWARD_SERVER_TOKEN)\n")
            monkeypatch.setenv("REWARD_SERVER_TOKEN", "secret")
            loaded = load_reward(line.split()[4])
            images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
            found = RewardSet((loaded,), (1.0,))(images, ["a", "bb", ""]).total
            np.testing.assert_allclose(found, images.mean(axis=(1, 2, 3)) + [1, 2, 0], rtol=1e-6)
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) in (0, 130)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bright.py", "--host", "0.0.0.0"], "lets others in, and there is no token"),
        (["bright.py", "--concurrency", "0"], "concurrency is 0; expected 1 or more"),
        (["bright.py", "--port", "80000"], "port is 80000; expected 0 to 65535"),
        (["bright.py", "--port", "-1"], "port is -1; expected 0 to 65535"),
        (["bright.py", "--max-megabytes", "nan"], "max_megabytes is nan; expected 0.001 or more"),
        (["brite"], "unknown reward 'brite'"),
        ([], "reward"),
    ],
)
def test_what_cannot_be_served_is_told(folder, capsys, monkeypatch, words, message) -> None:
    monkeypatch.delenv("REWARD_SERVER_TOKEN", raising=False)
    assert main(["serve-reward", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(folder, capsys) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "bright.py", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err
