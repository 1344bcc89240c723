"""Which model of a run a word means, and what `compare` takes from the run."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_run import config
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo.cli import main
from diffusion_grpo.commands.compare import _labels
from diffusion_grpo.config import to_yaml
from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.run_models import Source, find_model, find_models, run_prompts
from diffusion_grpo.sampling import SamplingDefaults, write_sampling

UNET = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_pipeline(tmp_path_factory.mktemp("run_models") / "base", **TWO_LEVELS)
    write_sampling(folder, SamplingDefaults(7.0, 5))
    return folder


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """A model that says how it was evaluated, and is not the base."""
    folder = shutil.copytree(checkpoint, tmp_path_factory.mktemp("trained") / "final")
    file = folder / f"{UNET}.safetensors"
    tensors = load_file(file)
    tensors["conv_out.weight"] *= 2
    save_file(tensors, file)
    write_sampling(folder, SamplingDefaults(3.0, 2, 1))
    return folder


def write_run(folder, checkpoint, final=None, **changed):
    """Write a run directory as `train` leaves it, without training."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(config(checkpoint, folder, **changed)))
    if final is not None:
        shutil.copytree(final, run / "final")
    return run


def best(run, model, iterations=2):
    found = {"iterations": iterations, "mean": 0.5, "by": ["total"], "model": model}
    (run / "best.json").write_text(json.dumps(found))
    return f"{run}@best"


def test_the_best_model_is_the_one_that_best_json_names(tmp_path, checkpoint):
    run = write_run(tmp_path, checkpoint)
    for name in ("final", "best", "checkpoints/2"):
        (run / name).mkdir(parents=True)
    assert find_model(best(run, "best/")) == Source(str(run / "best"))
    (run / "best").rmdir()
    assert find_model(best(run, "final/")) == Source(str(run / "final"))
    with pytest.raises(UsageError, match=r"no evaluation .* untrained model; take .*run@base"):
        find_model(best(run, "the untrained model"))
    not_kept = "not kept (eval.keep_best is False)"
    with pytest.raises(UsageError, match=r"after 2 iterations.*not kept.*`.* export \S+run@2 "):
        find_model(best(run, not_kept))
    with pytest.raises(UsageError, match=r"after 4 iterations.*--eval.keep-best True"):
        find_model(best(run, not_kept, 4))
    with pytest.raises(UsageError, match="after 2 iterations, but the run has no best/"):
        find_model(best(run, "best/"))
    (run / "best.json").write_text("[]")
    with pytest.raises(UsageError, match="best.json does not say which model is the best"):
        find_model(f"{run}@best")


def test_the_base_has_the_revision_and_variant_of_its_run(tmp_path, checkpoint):
    changed = {"model__revision": "v2", "model__variant": "non_ema"}
    run = write_run(tmp_path, "owner/name", checkpoint, **changed)
    base, final = Source("owner/name", "v2", "non_ema"), Source(str(run / "final"))
    assert find_models([f"{run}@base", str(run)]) == [base, final]
    given = find_models([f"{run}@base", str(run), "owner/other"], revision="v3", variant="fp16")
    assert given == [
        Source("owner/name", "v3", "fp16"),
        final,
        Source("owner/other", "v3", "fp16"),
    ]
    with pytest.raises(UsageError, match=r"variant is 'fp16', but what a run trained .*--variant"):
        find_models([str(run), f"{run}@final"], variant="fp16")
    (run / "config.yaml").write_text("[]")
    with pytest.raises(UsageError, match="config.yaml is not the configuration of a run"):
        find_model(f"{run}@base")


def test_a_run_begins_with_the_model_of_another(tmp_path, checkpoint, monkeypatch, capsys):
    changed = {"model__revision": "v2", "model__variant": "non_ema"}
    run = write_run(tmp_path, "owner/name", **changed)
    seen = []

    def begin(config, **_):
        seen.append((config.model.pretrained, config.model.revision, config.model.variant))
        raise UsageError("begun")

    monkeypatch.setattr("diffusion_grpo.train.train", begin)
    words = ["train", "demo", "--run.output", str(tmp_path / "new")]
    assert main([*words, "--model", str(run)]) == 2
    assert "the run has no final/; wait for its end" in capsys.readouterr().err and not seen
    shutil.copytree(checkpoint, run / "final")
    for word in (str(run), f"{run}@base", str(checkpoint)):
        assert main([*words, "--model", word]) == 2
    assert seen == [
        (str(run / "final"), None, None),
        ("owner/name", "v2", "non_ema"),
        (str(checkpoint), None, None),
    ]
    assert main(["plan", "demo", "--model", str(run)]) == 0
    assert f"1 x cpu, {run / 'final'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--prompt", "a", "--model", "{run}@base"],
        ["compare", "{run}", "--prompt", "a"],
        ["evaluate", "{run}", "--base", "{run}@base"],
        ["bench", "--model", "{run}@base"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_asks_the_hub_for_the_revision_of_the_run(
    words, tmp_path, checkpoint, monkeypatch, capsys
):
    changed = {"model__revision": "v2", "model__variant": "non_ema"}
    run = write_run(tmp_path, "owner/name", checkpoint, **changed)

    def snapshot_download(name, *, revision, allow_patterns):
        assert f"{UNET}.non_ema.safetensors" in allow_patterns
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=run) for word in words]) == 2
    assert "'owner/name' (revision 'v2') is not a directory here" in capsys.readouterr().err


def test_the_base_is_drawn_with_the_variant_of_the_run(tmp_path, checkpoint, trained):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    run = write_run(tmp_path, base, model__variant="non_ema")
    shutil.copy(trained / f"{UNET}.safetensors", base / f"{UNET}.non_ema.safetensors")

    def drawn(model):
        words = ["--prompt", "a circle", "--num-images", "1", "--num-steps", "2", "--font-size"]
        path = tmp_path / "grid.png"
        assert main(["sample", "--model", model, *words, "0", "--output", str(path)]) == 0
        return np.asarray(Image.open(path)).astype(int)

    with pytest.warns(UserWarning, match="no weights of the variant 'non_ema' for vae"):
        found = drawn(f"{run}@base")
    assert np.abs(found - drawn(str(base))).max() > 3


def compared(words, tmp_path, *options):
    path = tmp_path / "compare.png"
    common = ["--prompt", "a circle", "--output", path, *options]
    assert main([str(word) for word in ["compare", *words, *common]]) == 0
    with Image.open(path) as image:
        image.load()
        names = ("guidance_scale", "num_steps", "clip_skip", "settings_of")
        return [image.text[name] for name in names]


@pytest.mark.slow
def test_all_columns_are_drawn_as_the_run_was_evaluated(tmp_path, checkpoint, trained, capsys):
    run = write_run(tmp_path, checkpoint, trained)
    assert compared([run], tmp_path) == ["3.0", "2", "1", str(run)]
    said = "guidance scale 3, 2 steps of ddim, clip skip 1, as run says"
    assert said in capsys.readouterr().err
    assert compared([run, checkpoint], tmp_path) == ["3.0", "2", "1", str(run)]
    given = compared([checkpoint, run], tmp_path, "--guidance-scale", "1")
    assert given == ["1.0", "2", "1", str(run)]
    assert "as run says but for what is given (guidance_scale)" in capsys.readouterr().err
    assert compared([checkpoint, trained], tmp_path) == ["3.0", "2", "1", str(trained)]


def test_models_that_draw_in_different_sizes_are_shown_in_one(
    tmp_path, checkpoint, capsys, monkeypatch
):
    large = shutil.copytree(checkpoint, tmp_path / "large")
    settings = json.loads((large / "unet" / "config.json").read_text())
    settings["sample_size"] *= 5
    (large / "unet" / "config.json").write_text(json.dumps(settings))
    shades = []

    def generate(model, texts, **_):
        shades.append(40 + 40 * len(shades))
        return np.full((len(texts), *model.image_size, 3), shades[-1], np.uint8)

    monkeypatch.setattr("diffusion_grpo.pipeline.generate", generate)
    compared([checkpoint, large], tmp_path)
    said = capsys.readouterr().err
    assert re.search(r"different sizes \(base \d+ x \d+, large \d+ x \d+\); the smaller", said)
    pixels = np.asarray(Image.open(tmp_path / "compare.png"))
    counts = [(pixels == shade).all(axis=-1).sum() for shade in shades]
    assert counts[0] == counts[1] > 128**2
    # what is too large for the file is found where the second model is the large one, too
    side = int(counts[0] ** 0.5)
    monkeypatch.setattr("diffusion_grpo.images._LONGEST", {"WEBP": 2 * side})
    words = ["compare", str(checkpoint), str(large), "--prompt", "a circle", "--output"]
    assert main([*words, str(tmp_path / "page.webp")]) == 2
    assert "compare fewer" in capsys.readouterr().err and len(shades) == 3


def test_models_of_one_name_are_told_apart():
    words = ["x/demo", "y/demo@base", "shapes-diffusion"]
    labels = ["x/demo", "y/demo@base", "shapes-diffusion"]
    assert _labels(words, ["x/demo/final", "base", words[2]]) == labels
    assert _labels(["x/demo@base", "x/demo"], ["base", "x/demo/final"]) == ["demo@base", "demo"]
    assert _labels(["x/a", "owner/b"], ["x/a/best", "owner/b"]) == ["a", "b"]


def test_a_run_says_whether_what_it_is_evaluated_on_was_held_out(tmp_path, checkpoint):
    lists = {"prompts__train": "animals", "prompts__heldout": "animals_heldout"}
    names = [("animals_heldout", 0.0), ("None", 0.3), ("None", 0.0)]
    found = []
    for number, (heldout, share) in enumerate(names):
        (folder := tmp_path / str(number)).mkdir()
        changed = lists | {"prompts__heldout": heldout, "prompts__heldout_share": share}
        own = run_prompts([str(write_run(folder, checkpoint, **changed))])
        assert own is not None
        found.append((own.which, len(own.prompts) == len(load_prompts("animals"))))
    assert found == [("held-out", False), ("held-out", False), ("training", True)]
    assert run_prompts(["shapes-diffusion"]) is None


def test_compare_draws_prompts_that_the_run_held_out(tmp_path, checkpoint, trained):
    run = write_run(tmp_path, checkpoint, trained)
    texts = [f"a circle number {number}" for number in range(20)]
    (tmp_path / "all.txt").write_text("\n".join(texts))
    values = yaml.safe_load((run / "config.yaml").read_text())
    lists = {"train": str(tmp_path / "all.txt"), "heldout": None, "heldout_share": 0.3}
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"prompts": lists}))
    (tmp_path / "seen.py").write_text(
        "import json, pathlib\n\n"
        "def seen(images, prompts, metadata):\n"
        "    pathlib.Path(__file__).with_suffix('.json').write_text(json.dumps(prompts))\n"
        "    return [0.0] * len(images)\n"
    )
    words = ["compare", run, "--reward", tmp_path / "seen.py", "--output", tmp_path / "c.png"]
    assert main([*map(str, words), "--num-steps", "1", "--num-prompts", "3"]) == 0
    below = 0.3 * 2**64
    digests = {text: hashlib.sha256(text.encode()).digest()[:8] for text in texts}
    held = [text for text in texts if int.from_bytes(digests[text], "big") < below]
    assert 3 <= len(held) < 20
    assert json.loads((tmp_path / "seen.json").read_text()) == held[:3]
