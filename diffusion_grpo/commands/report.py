"""`diffusion-grpo report`: runs as one HTML page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from diffusion_grpo.commands.common import parse
from diffusion_grpo.output_files import check_output
from diffusion_grpo.report import REPORT_FILE, report_page, save_page


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Write a run, or several to compare, as one HTML page that needs no network."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run directories."""
    output: Path | None = None
    """The page; by default RUN/report.html, or report.html here for several runs."""


def run(words: Sequence[str]) -> list[Path]:
    """Write the page; returns where."""
    options = parse(ReportOptions, words, "diffusion-grpo report")
    several = len(options.runs) != 1
    path = options.output or (Path() if several else Path(options.runs[0])) / REPORT_FILE
    page = report_page(options.runs)
    return [save_page(check_output(path, (".html", ".htm")), page)]
