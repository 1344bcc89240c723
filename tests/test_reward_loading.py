import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_grpo.errors import UsageError
from diffusion_grpo.reward import RewardSet, list_rewards, load_reward, wrap_reward

BRIGHTNESS = '''"""Brightness: the mean of all pixels, in [0, 1]."""

import numpy as np


def brightness(images, prompts, metadata):
    return images.mean(axis=(1, 2, 3), dtype=np.float64) / 255
'''

FACTORY = """
from __future__ import annotations
from typing import Literal
from diffusion_grpo.reward import reward_factory


@reward_factory
def power(
    exponent: float = 1.0, sign: Literal["plus", "minus"] = "plus", limit: int | None = None,
    negate: bool = False, label: str = "", base=2,
):
    def reward(images, prompts, metadata):
        return [0.0] * len(prompts)

    reward.given = (exponent, sign, limit, negate, label, base)
    return reward
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# --- Where rewards are found --------------------------------------------------------------------


def test_a_function_of_a_notebook_is_a_reward(monkeypatch) -> None:
    notebook = types.ModuleType("__main__")  # without a file, as it is there
    exec(BRIGHTNESS, vars(notebook))
    monkeypatch.setitem(sys.modules, "__main__", notebook)
    reward = load_reward("__main__:brightness")
    assert (reward.name, reward.function) == ("brightness", vars(notebook)["brightness"])
    message = r"the module '__main__' has no 'brightnes' \(did you mean 'brightness'\?\)"
    with pytest.raises(UsageError, match=message):
        load_reward("__main__:brightnes")


def test_a_users_file_of_ten_lines_is_a_reward(tmp_path) -> None:
    reward = load_reward(write(tmp_path / "brightness.py", BRIGHTNESS))
    assert (reward.name, reward.on_device, reward.batch_size) == ("brightness", False, None)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 24, 3), dtype=np.uint8)
    result = RewardSet((reward,), (2.0,))(images, ["a"] * 4)
    expected = images.reshape(4, -1).astype(np.float64).mean(axis=1) / 255
    np.testing.assert_allclose(result.scores["brightness"], expected, rtol=1e-6)
    np.testing.assert_allclose(result.total, 2 * expected, rtol=1e-6)
    assert result.total.dtype == np.float32 and result.seconds["brightness"] >= 0


def test_the_function_of_a_file_is_the_one_asked_for_or_named_like_it_or_the_only_one(
    tmp_path,
) -> None:
    def function(name: str, value: float) -> str:
        return f"def {name}(images, prompts, metadata):\n    return {value}\n"

    both = "from math import sqrt\nimport numpy as np\n" + function("one", 1) + function("two", 2)
    only = "from math import sqrt\nfrom os.path import join\n" + function("score", 3)
    only += "def _helper(): ...\nclass Helper: ...\nLIMIT = 3\n"
    path = write(tmp_path / "two.py", both)
    assert load_reward(path).function(0, 0, 0) == 2
    assert load_reward(f"{path}:one").function(0, 0, 0) == 1
    assert load_reward(f"{path}:one").name == "one"
    assert load_reward(write(tmp_path / "my-reward.py", only)).function(0, 0, 0) == 3
    path = write(tmp_path / "neither.py", both)
    with pytest.raises(UsageError, match="say which, one of neither.py:one, neither.py:two"):
        load_reward(path)
    with pytest.raises(UsageError, match=r"has no 'tow' .did you mean 'two'.*it defines: one, two"):
        load_reward(f"{path}:tow")
    with pytest.raises(UsageError, match="defines no public function: write one of"):
        load_reward(write(tmp_path / "empty.py", "LIMIT = 3\n"))


def test_a_users_file_shadows_no_module_and_each_load_is_its_own(tmp_path) -> None:
    before = dict(sys.modules)
    path = write(tmp_path / "json.py", BRIGHTNESS + "\nstate = []\n")
    first, second = load_reward(path), load_reward(path)
    assert first.function.__globals__["state"] is not second.function.__globals__["state"]
    assert {name: sys.modules[name] for name in before} == before
    assert str(tmp_path) not in sys.path


def test_a_reward_file_imports_what_lies_beside_it_while_it_is_imported(tmp_path) -> None:
    write(tmp_path / "beside_reward.py", "from beside_package import level\nLEVEL = level.LEVEL\n")
    (tmp_path / "beside_package").mkdir()
    write(tmp_path / "beside_package" / "__init__.py", "")
    write(tmp_path / "beside_package" / "level.py", "LEVEL = 7\n")
    write(tmp_path / "colorsys.py", "raise ImportError('an installed module goes first')\n")
    write(tmp_path / "beside_later.py", "LEVEL = 8\n")
    text = "import colorsys\nimport beside_reward\n\n\ndef score(images, prompts, metadata):\n"
    text += "    import beside_package.level\n    return beside_reward.LEVEL\n\n\n"
    text += "def late(images, prompts, metadata):\n    import beside_later\n"
    file = write(tmp_path / "score.py", text)
    path = list(sys.path)
    assert load_reward(f"{file}:score").function(0, 0, 0) == 7
    assert sys.path == path
    with pytest.raises(ModuleNotFoundError, match="beside_later"):
        load_reward(f"{file}:late").function(0, 0, 0)
    write(tmp_path / "score.py", "import beside_reward\nimport beside_nothing\n")
    with pytest.raises(UsageError, match="No module named 'beside_nothing' .*score.py, line 2"):
        load_reward(file)
    assert sys.path == path


def test_the_neighbors_of_two_folders_are_not_taken_for_each_other(tmp_path) -> None:
    text = "import {0}\n\n\ndef score(images, prompts, metadata):\n    return {0}.LEVEL\n"
    for name, level in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "common_neighbor.py", f"LEVEL = {level}\n")
        write(tmp_path / name / f"only_{name}.py", f"LEVEL = {10 * level}\n")
        write(tmp_path / name / "score.py", text.format("common_neighbor"))
        write(tmp_path / name / "other.py", text.format(f"only_{name}"))
    first = load_reward(str(tmp_path / "one" / "score.py"))
    module = sys.modules["common_neighbor"]
    for file, level in (("one/score.py", 1), ("one/other.py", 10), ("two/other.py", 20)):
        assert load_reward(str(tmp_path / file)).function(0, 0, 0) == level
    with pytest.raises(UsageError, match="imports 'common_neighbor' from .*two.*from .*one.*give"):
        load_reward(str(tmp_path / "two" / "score.py"))
    assert sys.modules["common_neighbor"] is module and first.function(0, 0, 0) == 1


def test_a_fault_in_a_reward_file_is_reported_with_its_line(tmp_path) -> None:
    path = write(tmp_path / "faulty.py", "import math\n\nLIMIT = math.sqrt('x')\n")
    with pytest.raises(
        UsageError, match=r"could not be imported: TypeError: .*faulty\.py, line 3\)"
    ):
        load_reward(path)
    # The fault itself lies in a library: the line of the user's file is still the one to name.
    path = write(tmp_path / "deep.py", "import json\n\n\nLIMIT = json.loads('{')\n")
    with pytest.raises(UsageError, match=r"JSONDecodeError: .*deep\.py, line 4\)"):
        load_reward(path)
    path = write(tmp_path / "typo.py", "def f(:\n    pass\n")
    with pytest.raises(UsageError, match=r"SyntaxError: invalid syntax \(.*typo\.py, line 1\)"):
        load_reward(path)
    path = write(tmp_path / "needs.py", "\nimport a_library_that_is_not_there\n")
    with pytest.raises(
        UsageError, match="No module named 'a_library_that_is_not_there' .*needs.py, line 2"
    ):
        load_reward(path)
    assert not [
        name for name in sys.modules if name.startswith("_diffusion_grpo") and "typo" in name
    ]


def test_a_function_of_an_importable_module_is_a_reward(tmp_path, monkeypatch) -> None:
    package = tmp_path / "some_package_of_rewards"
    package.mkdir()
    write(package / "__init__.py", "")
    write(package / "scores.py", BRIGHTNESS)
    write(package / "broken.py", "1 / 0\n")
    spec = "some_package_of_rewards.scores:brightness"
    with pytest.raises(UsageError, match="No module named 'some_package_of_rewards'"):
        load_reward(spec)
    path = list(sys.path)
    monkeypatch.chdir(tmp_path)  # as a user's own package is, next to where the command runs
    assert load_reward(spec).name == "brightness"
    assert sys.path == path
    with pytest.raises(UsageError, match="has no 'brightnes' .did you mean 'brightness'"):
        load_reward("some_package_of_rewards.scores:brightnes")
    with pytest.raises(UsageError, match=r"ZeroDivisionError: .*broken\.py, line 1\)"):
        load_reward("some_package_of_rewards.broken:f")


def test_an_installed_entry_point_is_a_reward(tmp_path, monkeypatch) -> None:
    write(tmp_path / "module_of_a_plugin.py", FACTORY + BRIGHTNESS)
    info = tmp_path / "a_plugin-1.0.dist-info"
    info.mkdir()
    write(info / "METADATA", "Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n")
    lines = (
        "[diffusion_grpo.rewards]",
        "glow = module_of_a_plugin:brightness",
        "power = module_of_a_plugin:power",
        "jpeg_size = module_of_a_plugin:brightness",
        "gone = module_of_a_plugin:gone",
    )
    write(info / "entry_points.txt", "\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="unknown reward 'glow'"):
        load_reward("glow")
    monkeypatch.syspath_prepend(tmp_path)
    glow = load_reward("glow")
    assert glow.name == "glow" and glow.function.__name__ == "brightness"
    assert load_reward("power", {"exponent": "2"}).options == {"exponent": 2.0}
    assert load_reward("jpeg_size").function.__name__ == "reward"  # the built-in one goes first
    with pytest.raises(UsageError, match="'gone' could not be imported: AttributeError"):
        load_reward("gone")
    with pytest.raises(UsageError, match="did you mean 'glow'.*; installed: glow, gone, power;"):
        load_reward("glwo")
    rival = tmp_path / "rival-1.0.dist-info"
    rival.mkdir()
    write(rival / "METADATA", "Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    write(rival / "entry_points.txt", "[diffusion_grpo.rewards]\nglow = json:dumps\n")
    with pytest.raises(
        UsageError, match="several installed packages .json:dumps, module_of_a_plugin:brightness."
    ):
        load_reward("glow")


def test_an_unknown_reward_is_an_error_that_lists_what_there_is(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        UsageError,
        match="unknown reward 'jpg_size' .did you mean 'jpeg_size'.*built in: .*jpeg_size",
    ):
        load_reward("jpg_size")
    with pytest.raises(UsageError, match="there is no file 'nowhere/my.py'"):
        load_reward("nowhere/my.py:score")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "glow.py", BRIGHTNESS)
    with pytest.raises(UsageError, match="for the file 'glow.py', give its name with .py"):
        load_reward("glow")


def test_built_in_rewards_are_listed_without_being_executed() -> None:
    listed = list_rewards()
    assert listed["jpeg_size"].startswith("Compressibility: minus the size of the image as a JPEG")
    assert all(line.endswith(".") for line in listed.values())
    code = (
        "import sys, diffusion_grpo.reward as reward; reward.list_rewards(); "
        "slow = {'jax', 'torch', 'diffusers', 'transformers', 'orbax'} & set(sys.modules); "
        "executed = [m for m in sys.modules if m.startswith('_diffusion_grpo_reward')]; "
        "sys.exit(f'{slow} {executed}' if slow or executed else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# --- What makes a reward ------------------------------------------------------------------------


def test_a_factory_gets_its_options_converted(tmp_path) -> None:
    path = write(tmp_path / "power.py", FACTORY)
    assert load_reward(path).function.given == (1.0, "plus", None, False, "", 2)
    options = {
        "exponent": "2",
        "sign": "minus",
        "limit": "5",
        "negate": "true",
        "label": "7",
        "base": "3",
    }
    loaded = load_reward(path, options)
    assert loaded.function.given == (2.0, "minus", 5, True, "7", 3)
    assert loaded.options["exponent"] == 2.0


def test_options_that_a_reward_does_not_take_are_errors(tmp_path) -> None:
    path = write(tmp_path / "power.py", FACTORY)
    with pytest.raises(
        UsageError, match="no option 'exponnt' .did you mean 'exponent'.*its options: exponent"
    ):
        load_reward(path, {"exponnt": "2"})
    with pytest.raises(
        UsageError, match="option 'sign' of reward .* is 'plu' .did you mean 'plus'"
    ):
        load_reward(path, {"sign": "plu"})
    plain = write(tmp_path / "brightness.py", BRIGHTNESS)
    with pytest.raises(UsageError, match="takes no options, but scale was given"):
        load_reward(plain, {"scale": "2"})
    needs = FACTORY.replace("exponent: float = 1.0", "exponent: float")
    with pytest.raises(UsageError, match="needs the option 'exponent', which was not given"):
        load_reward(write(tmp_path / "needs.py", needs))


def test_a_factory_that_fails_is_reported_with_its_line_and_usage_errors_as_they_are(
    tmp_path,
) -> None:
    head = "from diffusion_grpo.reward import reward_factory\n@reward_factory\ndef make():\n"
    path = write(tmp_path / "make.py", head + "    return {}['weights']\n")
    with pytest.raises(
        UsageError, match=r"could not be built: KeyError: 'weights' \(.*make\.py, line 4\)"
    ):
        load_reward(path)
    message = (
        "    from diffusion_grpo.errors import UsageError\n    raise UsageError('no such model')\n"
    )
    path = write(tmp_path / "make2.py", head + message)
    with pytest.raises(UsageError, match="^no such model$"):
        load_reward(path)


def test_what_is_not_a_reward_is_an_error(tmp_path) -> None:
    cases = {
        "LIMIT = 3": "is int 3, expected a callable of",
        "def LIMIT(radius=2): ...": r"takes \(radius=2\), but .* mark it with .*reward_factory",
        "class LIMIT: ...": "is a class or a factory",
    }
    for number, (code, message) in enumerate(cases.items()):
        path = write(tmp_path / f"case{number}.py", code)
        with pytest.raises(UsageError, match=message):
            load_reward(f"{path}:LIMIT")


def test_a_reward_declares_its_name_its_batch_size_and_where_it_runs() -> None:
    class Score:
        name = "score"
        batch_size = 3
        on_device = True

        def __call__(self, images, prompts, metadata):
            return jnp.zeros(len(prompts))

    loaded = wrap_reward(Score(), name="other")
    assert (loaded.name, loaded.batch_size, loaded.on_device) == ("score", 3, True)
    for attribute, value, message in (
        ("name", "a b", "has the name 'a b': expected a word"),
        ("name", 3, "has the name 3"),
        ("batch_size", 0, "batch_size 0: expected a whole number of at least 1"),
        ("on_device", "yes", "on_device 'yes': expected True or False"),
    ):
        faulty = Score()
        setattr(faulty, attribute, value)
        with pytest.raises(UsageError, match=message):
            wrap_reward(faulty, name="other")
