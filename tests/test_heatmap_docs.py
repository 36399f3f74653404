"""The page on heatmaps: what it shows is what comes out, and its picture is that of its script."""

import doctest
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def test_the_examples_of_the_page():
    page = (DOCS / "heatmaps.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == page.count("```") / 2
    names = {}
    for number, block in enumerate(blocks):
        example = doctest.DocTestParser().get_doctest(block, names, f"heatmaps.md, block {number}", "heatmaps.md", 0)
        assert example.examples
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(example, clear_globs=False).failed == 0
        names = example.globs


def test_the_picture_of_the_page(tmp_path):
    matplotlib, pillow = pytest.importorskip("matplotlib"), pytest.importorskip("PIL.Image")
    committed = DOCS / "pictures" / "heatmaps.png"
    assert committed.stat().st_size < 200_000
    if matplotlib.__version__ not in pillow.open(committed).info["Software"]:
        pytest.skip("the committed picture comes from another version of matplotlib, which lays it out otherwise")
    specification = importlib.util.spec_from_file_location("heatmaps", committed.with_suffix(".py"))
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    script.draw(tmp_path / "heatmaps.png")
    pixels = [
        torch.from_numpy(np.asarray(pillow.open(path)).copy()).int() for path in (committed, tmp_path / "heatmaps.png")
    ]
    # A cell's last bit may differ between processors, and with it its colour by a step of the palette.
    assert (pixels[0] - pixels[1]).abs().max() <= 3
