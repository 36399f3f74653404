"""The page on ragged batches: what it shows is what comes out."""

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "ragged.md"


def test_the_examples_of_the_page():
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```") / 2
    names = {}
    for number, block in enumerate(blocks):
        example = doctest.DocTestParser().get_doctest(block, names, f"ragged.md, block {number}", str(PAGE), 0)
        assert example.examples
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(example, clear_globs=False).failed == 0
        names = example.globs
