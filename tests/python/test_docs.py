"""The Python in docs/python.md, docs/sampling.md and README.md runs: the blocks of a section in order, those of a page in
one namespace.

SPDX-License-Identifier: Apache-2.0
"""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "numpy", "tvm_ffi")  # a section that imports one is left out without it


def blocks(page):
    """[(heading, first line's number, text)] of ```python blocks."""
    found, heading, start, lines = [], "", None, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if start is not None:
            if line.strip() == "```":
                found.append((heading, start, "\n".join(lines) + "\n"))
                start, lines = None, []
            else:
                lines.append(line)
        elif line.strip() == "```python":
            start = number + 1
        elif line.startswith("#"):
            heading = line.lstrip("# ")
    return found


def needs(text):
    imported = re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)
    return {name for name in imported if name in PACKAGES}


@pytest.mark.parametrize("page", ["docs/python.md", "docs/sampling.md", "README.md"])
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks(ROOT / page)
    assert found, "no python in it"
    namespace, left_out = {"__name__": page}, set()
    for heading, line, text in found:
        missing = {name for name in needs(text) if importlib.util.find_spec(name) is None}
        if missing:
            left_out.add(heading)
        if heading in left_out:
            continue
        # Line numbers of a failure are those of the page.
        exec(compile("\n" * (line - 1) + text, str(ROOT / page), "exec"), namespace)
    if len(left_out) == len({heading for heading, _, _ in found}):
        pytest.skip(f"not installed: what {', '.join(sorted(left_out))} import")
