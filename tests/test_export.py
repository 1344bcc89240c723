"""A LoRA run's model in every form, as Diffusers loads it, and adapters in `sample`."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_kohya
from PIL import Image
from safetensors.numpy import load_file
from tiny_run import config
from torch_checkpoints import TOKENS, TWO_LEVELS, WIDTH, write_pipeline

from diffusion_grpo.checkpoint import Checkpoints
from diffusion_grpo.cli import main
from diffusion_grpo.config import load_config, to_yaml
from diffusion_grpo.lora_files import FILE
from diffusion_grpo.model_card import model_card
from diffusion_grpo.pipeline import make_policy
from diffusion_grpo.preparation import load_model, lora_options
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.results import export as export_final
from diffusion_grpo.sampling import SamplingDefaults
from diffusion_grpo.train import leaves, make_policy_and_learner, train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("export") / "pipeline", **TWO_LEVELS)


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    changed = {"model__trainable": "lora", "optim__learning_rate": 0.05, "model__lora_alpha": 7}
    train(config(checkpoint, folder, **changed), quiet=True)
    return folder / "run"


def output_of(unet):
    rng = np.random.default_rng(0)
    sample, states = rng.normal(size=(2, 4, 8, 8)), rng.normal(size=(2, TOKENS, WIDTH))
    with torch.no_grad():
        x = (torch.tensor(sample, dtype=torch.float32), torch.tensor([700, 20]))
        return unet(*x, torch.tensor(states, dtype=torch.float32)).sample.numpy()


@pytest.fixture(scope="module")
def trained(finished, checkpoint):
    """What the trained UNet gives, and what the untrained one does."""
    found = [
        output_of(UNet2DConditionModel.from_pretrained(path / "unet"))
        for path in (finished / "final", checkpoint)
    ]
    assert np.abs(found[0] - found[1]).max() > 1e-2
    return found


def export(run, output, *words):
    assert main(["export", str(run), "--output", str(output), "--quiet", *words]) == 0
    return output


def test_the_adapter_alone_gives_the_trained_network(finished, checkpoint, trained, tmp_path):
    export(finished, tmp_path / "lora", "--format", "lora")
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.load_lora_weights(tmp_path / "lora")
    np.testing.assert_allclose(output_of(pipe.unet), trained[0], atol=1e-4)


def test_the_adapter_by_kohya_s_names_is_as_diffusers_would_name_it(
    finished, checkpoint, trained, tmp_path
):
    out = export(finished, tmp_path / "kohya", "--format", "kohya")
    adapter = load_file(finished / "final" / "lora" / FILE)
    theirs = convert_state_dict_to_kohya({k: torch.tensor(x) for k, x in adapter.items()})
    found = load_file(out / FILE)
    assert found.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(found[name], value.numpy())
    assert {value.item() for name, value in found.items() if name.endswith("alpha")} == {8}
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint)
    pipe.load_lora_weights(out)
    np.testing.assert_allclose(output_of(pipe.unet), trained[0], atol=1e-4)
    assert "pipe.load_lora_weights" in (out / "README.md").read_text()


def test_the_merged_network_is_the_trained_one(finished, trained, tmp_path):
    export(finished, tmp_path / "unet", "--format", "merged")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    np.testing.assert_allclose(output_of(unet), trained[0], atol=1e-6)


def test_an_adapter_too_small_for_bfloat16_is_not_lost_in_a_bfloat16_run(checkpoint, tmp_path):
    """The update is a thousandth of a kernel; merged into bfloat16, most entries would not move."""
    settings = config(checkpoint, tmp_path, model__trainable="lora", model__dtype="bfloat16")
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    model = load_model(settings, checkpoint)
    policy = make_policy(model, guidance_scale=1.0, lora=lora_options(settings))
    rng = np.random.default_rng(0)
    trained = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(1e-3 * rng.normal(size=leaf.shape), jnp.float32),
        policy.trained,
    )
    export_final(settings, model, policy, trained, tmp_path / "final")

    adapter = load_file(tmp_path / "final" / "lora" / FILE)
    base = UNet2DConditionModel.from_pretrained(checkpoint / "unet").state_dict()
    written = UNet2DConditionModel.from_pretrained(tmp_path / "final" / "unet").state_dict()
    for path in {key.partition(".lora_")[0].removeprefix("unet.") for key in adapter}:
        a, b = (adapter[f"unet.{path}.lora_{name}.weight"] for name in "AB")
        change = b.astype(np.float64) @ a
        held = base[f"{path}.weight"].bfloat16().double().numpy()  # what the run computed with
        assert 0 < np.linalg.norm(change) < 5e-3 * np.linalg.norm(held)
        found = written[f"{path}.weight"].double().numpy() - held
        np.testing.assert_allclose(found, change, atol=1e-2 * np.abs(change).max())


def test_a_model_that_could_not_be_written_leaves_the_one_before(checkpoint, tmp_path, monkeypatch):
    settings = config(checkpoint, tmp_path, model__trainable="lora")
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    model = load_model(settings, checkpoint)
    policy = make_policy(model, guidance_scale=1.0, lora=lora_options(settings))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "before").touch()

    def full(model, directory):
        assert (directory / "lora" / FILE).is_file()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(StableDiffusion, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_final(settings, model, policy, policy.trained, tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["before"]
    assert not list(tmp_path.glob("best.*"))


def test_the_pipeline_in_half_precision(finished, tmp_path):
    export(finished, tmp_path / "pipeline", "--dtype", "float16")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float16)
    weights = load_file(finished / "final" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.unet.state_dict().items():
        assert value.dtype == torch.float16
        np.testing.assert_array_equal(value.numpy(), weights[name].astype(np.float16))


def test_the_card_has_results_and_configuration(finished, checkpoint, tmp_path):
    export(finished, tmp_path / "lora", "--format", "lora")
    for folder, loading in (
        (finished / "final", "from_pretrained"),
        (tmp_path / "lora", "load_lora_weights"),
    ):
        card = (folder / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front)["base_model"] == str(checkpoint)
        found = json.loads((finished / "evaluation.json").read_text())["rewards"]["jpeg_size"]
        assert f"{found['before']:.4f} ± " in body and f"{found['after']:.4f} ± " in body
        written = body.split("```yaml\n")[1].split("```")[0]
        assert yaml.safe_load(written) == yaml.safe_load((finished / "config.yaml").read_text())
        assert loading in body


@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_the_card_clips_no_more_than_the_run_did(pipeline, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    changes = {
        "scheduler/scheduler_config.json": {"clip_sample": True},
        "model_index.json": {"_class_name": pipeline},
    }
    for name, changed in changes.items():
        file = run / "final" / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    trained = StableDiffusion.from_pretrained(run / "final").scheduler_config.clip_sample
    if pipeline == "StableDiffusionPipeline":  # which takes the clipping back as it is built
        with pytest.warns(FutureWarning, match="clip_sample"):
            loaded = StableDiffusionPipeline.from_pretrained(run / "final")
        assert loaded.scheduler.config.clip_sample is trained is False
    export(run, tmp_path / "lora", "--format", "lora")
    assert f"clip_sample={trained}\n" in (tmp_path / "lora" / "README.md").read_text()


def test_the_card_names_the_base_and_the_settings_as_diffusers_takes_them(tmp_path):
    def card(**fields):
        values = {
            "model": {"pretrained": "owner/name", "trainable": "lora"} | fields,
            "rollout": {"negative_prompt": "a_b = blurry"},
            "grpo": {"algorithm": "grpo"},
            "reward": {"rewards": ["clip"]},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        return model_card(tmp_path, "lora", SamplingDefaults(3.0, 10, 1))

    loaded, called = [], []

    class DDIM:
        @staticmethod
        def from_config(scheduler, *, clip_sample):
            assert (scheduler, clip_sample) == ("that of the file", False)
            return "DDIM"

    class Pipe:
        scheduler = types.SimpleNamespace(config="that of the file")

        @staticmethod
        def from_pretrained(*words, **options):
            loaded.append((words, options))
            return Pipe()

        def load_lora_weights(self, path):
            pass

        def __call__(self, prompt, **options):
            assert self.scheduler == "DDIM"
            called.append(options)
            return types.SimpleNamespace(images=[None])

    def run(text):
        code = text.split("```python\n")[1].split("```")[0].partition("\n")[2]
        exec(code, {"DDIMScheduler": DDIM, "DiffusionPipeline": Pipe, "PROMPT": "a cat"})

    hub = card(revision="v2", variant="fp16")
    run(hub)
    assert loaded == [(("owner/name",), {"revision": "v2", "variant": "fp16"})]
    settings = {"guidance_scale": 3, "num_inference_steps": 10, "clip_skip": 1}
    assert called == [settings | {"negative_prompt": "a_b = blurry"}]
    assert (
        "guidance scale 3, num inference steps 10, clip skip 1, negative prompt 'a_b = blurry'"
        in hub
    )
    assert yaml.safe_load(hub.split("---\n")[1])["base_model"] == "owner/name"
    embedded = card(pretrained="shapes-diffusion")
    run(embedded)
    assert loaded[1] == (("PATH/TO/shapes-diffusion",), {})
    assert "base_model" not in yaml.safe_load(embedded.split("---\n")[1])
    assert "a LoRA adapter of its UNet fine-tuned" in hub
    assert "of its UNet and text encoders fine-tuned" in card(train_text_encoder=True)
    # a directory that is gone, or is named from elsewhere: its card is written all the same
    run(card(pretrained="../no/such/directory/here"))
    assert loaded[2] == (("../no/such/directory/here",), {})


@pytest.mark.parametrize(
    ("heldout", "share", "which"),
    [("list", 0.0, "held-out"), (None, 0.1, "held-out"), (None, 0.0, "training")],
)
def test_the_card_says_which_prompts_the_results_are_on(heldout, share, which, tmp_path):
    values = {
        "model": {"pretrained": "owner/name", "trainable": "lora"},
        "prompts": {"train": "animals", "heldout": heldout, "heldout_share": share},
        "rollout": {},
        "grpo": {"algorithm": "grpo"},
        "reward": {"rewards": ["clip"]},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    row = {"before": 0.25, "after": 0.5, "difference": 0.25}
    errors = {"before": 0.125, "after": 0.0625, "difference": None}  # None: of a single prompt
    row |= {f"{name}_standard_error": value for name, value in errors.items()}
    found = {"images": 3, "rewards": {"clip": row}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    card = model_card(tmp_path, "lora", SamplingDefaults())
    assert f"Means over 3 images of {which} prompts before and after training" in card
    assert "| `clip` | 0.2500 ± 0.1250 | 0.5000 ± 0.0625 | 0.2500 |\n" in card


def test_the_card_of_the_best_model_says_after_how_many_iterations_it_is(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "evaluation.json"):
        shutil.copy(finished / name, run)
    shutil.copytree(finished / "final", run / "best")
    for model, told in (("best/", True), ("final/", False)):  # the second: left from before
        (run / "best.json").write_text(json.dumps({"iterations": 1, "model": model}))
        out = export(f"{run}@best", tmp_path / model.strip("/"))
        assert ("the checkpoint after 1 iterations" in (out / "README.md").read_text()) == told


def test_sample_adds_adapters_up(finished, checkpoint, tmp_path):
    def drawn(name, model, *words):
        output = tmp_path / f"{name}.png"
        common = ["--prompt", "a red circle", "--num-images", "2", "--num-steps", "3", "--quiet"]
        options = [*common, "--guidance-scale", "2", "--font-size", "0", "--output", str(output)]
        assert main(["sample", "--model", str(model), *options, *words]) == 0
        return np.asarray(Image.open(output)).astype(int)

    whole, base = drawn("whole", finished), drawn("base", checkpoint)
    file = finished / "final" / "lora" / FILE
    assert np.abs(whole - base).max() > 3
    assert np.abs(drawn("one", checkpoint, "--lora", str(file)) - whole).max() <= 1
    halves = [f"{file}=0.25", f"{finished / 'final'}=0.75"]
    assert np.abs(drawn("two", checkpoint, "--lora", *halves) - whole).max() <= 1
    assert np.abs(drawn("none", checkpoint, "--lora", f"{file}=0") - base).max() <= 1


def test_a_checkpoint_is_the_model_that_a_run_of_as_many_iterations_ends_with(
    finished, checkpoint, tmp_path
):
    settings = {"model__trainable": "lora", "optim__learning_rate": 0.05, "model__lora_alpha": 7}
    train(config(checkpoint, tmp_path, run__iterations=1, **settings), quiet=True)
    before = sorted(path for path in finished.rglob("*"))
    for number, run in ((1, tmp_path / "run"), (2, finished)):
        out = export(f"{finished}@{number}", tmp_path / f"at{number}")
        for part in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json"):
            assert (out / part).read_bytes() == (run / "final" / part).read_bytes()
        assert f"the checkpoint after {number} iterations" in (out / "README.md").read_text()
    adapter = export(f"{finished}@1", tmp_path / "adapter", "--format", "lora") / FILE
    assert adapter.read_bytes() == (tmp_path / "run" / "final" / "lora" / FILE).read_bytes()
    assert sorted(path for path in finished.rglob("*")) == before


def test_a_checkpoint_is_exported_where_the_run_s_prompts_and_rewards_are_not(checkpoint, tmp_path):
    changed = {
        "model__trainable": "full",
        "grpo__advantage": "running",  # whose history is as long as the list of prompts
        "reward__rewards": tmp_path / "gone.py",
    }
    settings = config(checkpoint, tmp_path, **changed)
    (tmp_path / "prompts.txt").unlink()
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(settings))
    policy, learner, _ = make_policy_and_learner(settings, load_model(settings, checkpoint))
    state = learner.init(3)
    trained = jax.tree.map(lambda leaf: leaf + 1, state.train.params)
    state = state._replace(train=state.train._replace(params=trained, average=None))
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(4, leaves(state))
    checkpoints.close()
    weights = "unet/diffusion_pytorch_model.safetensors"
    found = load_file(export(f"{run}@4", tmp_path / "out") / weights)
    for name, value in load_file(checkpoint / weights).items():
        np.testing.assert_array_equal(found[name], value + 1)


def test_a_run_of_more_devices_is_exported_on_one(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("fsdp: 1", "fsdp: 4"))
    assert load_config(str(run / "config.yaml")).mesh.fsdp == 4
    weights = "unet/diffusion_pytorch_model.safetensors"
    out = export(f"{run}@2", tmp_path / "out")
    assert (out / weights).read_bytes() == (finished / "final" / weights).read_bytes()


def test_a_run_is_exported_on_devices_that_its_batches_do_not_divide_over(finished, tmp_path):
    # 2 prompts an iteration, on 4 devices
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    words = ["export", f"{finished}@2", "--output", str(tmp_path / "out"), "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "diffusion_grpo", *words],
        check=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    weights = "unet/diffusion_pytorch_model.safetensors"
    found, expected = (
        load_file(folder / weights) for folder in (tmp_path / "out", finished / "final")
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "--format", "lore"], "format is 'lore' (did you mean 'lora'?)"),
        (["{run}", "--dtype", "half"], "dtype is 'half'; expected one of float32, float16"),
        (["{run}", "--output", "{run}"], "is there and not an empty folder"),
        (["{run}@base"], "is what the run started from"),
        (["{run}@last"], "a run has the models final, best and base"),
        (["{run}@5"], "has no checkpoint 5; expected one of: 1, 2"),
        (["{run}/final"], "is no run directory: there is no config.yaml in it"),
    ],
)
def test_what_cannot_be_exported_is_refused(words, message, finished, tmp_path, capsys):
    words = [word.format(run=finished) for word in words]
    output = [] if "--output" in words else ["--output", str(tmp_path / "out")]
    assert main(["export", *words, *output]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an empty folder"])
def test_what_could_not_be_exported_whole_leaves_the_folder_as_it_was(
    there, finished, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "above" / "out"
    if there:
        output.mkdir(parents=True)
    words = ["export", str(finished), "--output", str(output), "--quiet"]
    card = model_card

    def no_room(*args, **kwargs):
        assert (output / "unet").is_dir() and (output / "model_index.json").is_file()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusion_grpo.model_card.model_card", no_room)
    assert main(words) == 1
    assert "No space left" in capsys.readouterr().err
    assert output.exists() == there and not (there and any(output.iterdir()))
    monkeypatch.setattr("diffusion_grpo.model_card.model_card", card)
    assert main(words) == 0


def test_a_run_of_all_weights_has_no_adapter(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "final" / "lora")
    words = ["--format", "lora", "--output", str(tmp_path / "out")]
    assert main(["export", str(run), *words]) == 2
    assert "has no adapter: the run trained all weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nowhere.safetensors", "lora 'nowhere.safetensors' does not exist"),
        ("a=b", "lora is 'a=b'; expected FILE or FILE=WEIGHT, a number"),
        ("a=nan", "the weight is not finite"),
    ],
)
def test_an_adapter_that_is_not_there_is_refused(word, message, capsys):
    assert main(["sample", "--prompt", "a circle", "--lora", word]) == 2
    assert message in capsys.readouterr().err
