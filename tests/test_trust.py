"""What comes from outside is data, never code; what is malformed is told, never a traceback."""

import ast
import dataclasses
import shutil
import string
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diffusion_grpo
from diffusion_grpo.checkpoint import Checkpoints
from diffusion_grpo.commands.sample import _write_singles
from diffusion_grpo.config import Config, load_config
from diffusion_grpo.errors import UsageError
from diffusion_grpo.prompt_files import load_prompts

PACKAGE = Path(diffusion_grpo.__file__).parent
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def sources():
    return [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "rewards").rglob("*.py")]


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_nothing_unpickles_or_runs_what_it_reads(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            assert name.partition(".")[0] not in UNPICKLING | {"torch"}, f"{path}: imports {name}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), f"{path}"
            assert called not in ("read_pickle", "pd.read_pickle", "torch.load"), f"{path}"
            for keyword in node.keywords:
                assert keyword.arg != "allow_pickle" or ast.unparse(keyword.value) == "False"


FIELDS = [
    (section.name, field.name)
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(getattr(Config, section.name))
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@st.composite
def configurations(draw):
    """YAML of real fields with any values, now and then of other fields, or broken."""
    values: dict = {}
    for section, field in draw(st.lists(st.sampled_from(FIELDS), max_size=4)):
        values.setdefault(section, {})[field] = draw(VALUES)
    if draw(st.booleans()):
        values[draw(st.text(max_size=5) | st.sampled_from(["preset", "model"]))] = draw(VALUES)
    text = yaml.safe_dump(values)
    cut = draw(st.integers(0, len(text)))
    return text if draw(st.booleans()) else text[:cut] + draw(st.text(max_size=5)) + text[cut:]


@settings(max_examples=60, **MANY)
@given(text=configurations())
def test_any_config_file_is_read_or_refused_with_a_message(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        load_config(str(path))
    except UsageError as error:
        assert str(error) and "Traceback" not in str(error)


LINES = st.lists(
    st.text(max_size=20)
    | st.sampled_from(['{"prompt": "a"}', '{"prompt": 3}', "prompt,weight", "a,1", "a {b} {", "b:"])
    | st.text(alphabet=string.punctuation, max_size=12),
    max_size=5,
).map("\n".join)


@settings(max_examples=80, **MANY)
@given(
    kind=st.sampled_from(["txt", "jsonl", "csv", "yaml", "parquet"]),
    content=LINES.map(lambda text: text.encode(errors="ignore")) | st.binary(max_size=60),
)
def test_any_prompt_file_is_read_or_refused_with_a_message(kind, content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"fuzzed.{kind}"
    path.write_bytes(content)
    try:
        prompts = load_prompts(path)
        assert all(isinstance(prompt.text, str) for prompt in prompts)
    except UsageError as error:
        assert str(error) and "Traceback" not in str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(directory)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    checkpoints.close()
    return directory


def state(step):
    return {"a": jnp.full((40, 50), step, jnp.float32), "n": jnp.int32(step)}


@settings(max_examples=12, **MANY)
@given(data=st.data())
def test_any_damage_of_checkpoints_is_survived_or_told(data, saved, tmp_path_factory):
    directory = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(saved, directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=3, unique=True)):
        content = bytearray(path.read_bytes())
        how = data.draw(st.sampled_from(["truncate", "flip", "remove", "replace"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if how == "remove":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(content[:at])
        elif how == "replace":
            path.write_bytes(data.draw(st.binary(max_size=40)))
        elif content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(content)
    checkpoints = Checkpoints(directory)
    try:
        step, found, _ = checkpoints.restore(state(0))
        np.testing.assert_array_equal(found["a"], state(step)["a"])  # never a wrong number
    except UsageError as error:
        assert "no checkpoint in" in str(error)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("text", ["../../evil", "/etc/passwd", "..", "a\x00b\n../c", "." * 300])
def test_no_prompt_leads_a_file_out_of_its_folder(text, tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    folder = tmp_path / "inner" / "singles"
    written = _write_singles(folder, images, [text], 2, {})
    assert len(written) == 2 and all(path.parent == folder for path in written)
    assert sorted(folder.iterdir()) == sorted(written)
    assert list(tmp_path.iterdir()) == [tmp_path / "inner"]
