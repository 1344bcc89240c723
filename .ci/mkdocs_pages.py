"""Pages of the site that are not under docs/: files from elsewhere in the repository, and the API.

A link to a page is kept, whichever folder it leads through; a link to another file of the
repository becomes its name, since the site has no copy of it; a link to nothing fails the build.
"""

import importlib
import pkgutil
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Path in the repository → page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "rewards/README.md": "rewards.md",
    "prompts/README.md": "prompts.md",
    "assets/shapes-diffusion/README.md": "shapes-diffusion.md",
    "assets/shapes-clip/README.md": "shapes-clip.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
# What runs, but is no one's API: the commands' entry point and what a child process executes.
NO_PAGE = ("diffusion_grpo.__main__",)


def modules() -> list[str]:
    """Return the names of the package's modules."""
    package = importlib.import_module("diffusion_grpo")
    found = [m.name for m in pkgutil.walk_packages(package.__path__, "diffusion_grpo.")]
    return ["diffusion_grpo", *sorted(name for name in found if name not in NO_PAGE)]


def on_config(config: Any) -> Any:
    """Put a page for each module into the navigation."""
    for section in config.nav:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if "Python API" in entry:
                entry["Python API"] = [
                    {name.removeprefix("diffusion_grpo."): f"api/{name}.md"} for name in modules()
                ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside docs/ and the API's."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=f"::: {name}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    path = page.file.src_uri
    if path.startswith("api/"):
        return markdown
    pages = {where: source for source, where in ELSEWHERE.items()}
    source = pages.get(path, f"docs/{path}")
    markdown = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)  # a model card's fields

    def link(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        goal = ELSEWHERE.get(file, file.removeprefix("docs/"))
        if files.get_file_from_path(goal) and (file in ELSEWHERE or file.startswith("docs/")):
            there = posixpath.relpath(goal, posixpath.dirname(path) or ".")
            return f"{image}[{text}]({there}{anchor or ''})"
        if not (ROOT / file).exists():
            raise PluginError(f"{source} links to {target}, which does not exist")
        if image:
            raise PluginError(f"{source} shows {target}, which is not under docs/")
        return text if text.startswith("`") else f"`{file}`"

    return LINK.sub(link, markdown)
