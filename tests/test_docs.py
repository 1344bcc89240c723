"""What the documentation says about the code's layout holds."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_architecture_names_every_module_once_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text()
    table = page[page.index("## Modules") : page.index("## Which way imports go")]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", table, re.M))
    named = [name.removeprefix("diffusion_grpo/") for name in re.findall(r"`([\w/]+\.py)`", cells)]
    package = ROOT / "diffusion_grpo"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert sorted(named) == sorted(modules)
    for folder in package.iterdir():
        if folder.is_dir() and folder.name not in ("__pycache__", "_resources"):
            assert f"`{folder.name}/`" in cells, folder.name
