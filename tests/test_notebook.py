"""The notebook runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "docs" / "demo.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path):
    book = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in book.cells if cell.source.startswith("iterations = "))
    settings.source = 'iterations = 1\noutput = "run"'
    (training,) = (
        cell for cell in book.cells if "load_config" in cell.source and "train(" in cell.source
    )
    fewer = (
        '"--eval.num-prompts", "8", "--eval.num-steps", "2", "--rollout.prompts-per-iteration", "4"'
    )
    training.source = training.source.replace("output])", f"output, {fewer}])")
    assert fewer in training.source
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "clip " in printed and "shapes " in printed and "gain" in printed


def test_the_notebook_is_kept_with_what_it_showed():
    book = nbformat.read(NOTEBOOK, as_version=4)
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "iteration 120/120" in said and "gain +" in said and "site-packages" not in said
