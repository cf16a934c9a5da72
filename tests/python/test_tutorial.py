"""examples/tutorial.py runs, and has the form that notebooks read.

SPDX-License-Identifier: Apache-2.0
"""

import pathlib
import runpy

import pytest

pytest.importorskip("torch")

TUTORIAL = pathlib.Path(__file__).parents[2] / "examples" / "tutorial.py"


def test_tutorial_runs(capsys):
    runpy.run_path(str(TUTORIAL))
    assert "all as in plain torch" in capsys.readouterr().out


def test_text_cells_are_text():
    cells = TUTORIAL.read_text(encoding="utf-8").split("# %%")
    assert cells[0] == "", "the first line begins a cell"
    text = [c for c in cells if c.startswith(" [markdown]\n")]
    assert len(text) >= 4 and len(cells) > 2 * 4
    for cell in text:
        lines = cell.splitlines()[1:]
        assert all(line == "" or line.startswith("#") for line in lines), cell
