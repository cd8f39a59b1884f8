"""docs/glossary.md: each word has one sentence or more, and stands where the page says."""

import re
from importlib import import_module, util
from pathlib import Path

PAGE = (Path(__file__).parents[1] / "docs" / "glossary.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| (?!word|-)", line)]


def test_every_word_is_explained_and_found_in_the_code():
    assert len(ROWS) >= 40
    assert len({row[0] for row in ROWS}) == len(ROWS)
    for word, _, meaning, where in ROWS:
        assert meaning.endswith("."), word
        path = f"rlfusion.{where.strip('`')}"
        module, _, name = path.rpartition(".")
        spec = util.find_spec(module)
        assert spec is not None, word
        of_module = spec.submodule_search_locations is not None and util.find_spec(path) is not None
        assert of_module or hasattr(import_module(module), name), f"{word}: {path} is not there"
