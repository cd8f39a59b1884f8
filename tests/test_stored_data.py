"""The tables of learning from stored data are what their script draws of the record."""

import json
import sys

import pytest
from house import ROOT


@pytest.fixture
def stored_data():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    before = set(sys.modules)
    import stored_data

    yield stored_data
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def test_the_pages_of_learners_from_stored_data_have_the_tables_of_the_record(stored_data):
    kept = json.loads(stored_data.OUT.read_text())
    assert list(kept) == list(stored_data.REWARDS)
    for reward, about in kept.items():
        written = {name: text.format(data="DATA") for name, text in stored_data.LEARNERS[reward].items()}
        assert about["agents"] == written
        assert about["updates"] == stored_data.UPDATES
        assert {len(seeds) for seeds in about["rows"].values()} == {3}
    for name in ("sft", "dpo"):
        page = (stored_data.DOCS / f"{name}.md").read_text()
        assert f"<!-- stored, {name.upper()} -->" in page
        assert stored_data.drawn(page, kept) == page


def test_the_best_quarter_is_that_of_each_class(stored_data):
    import torch

    value, label = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 7.0, 4.0, 8.0]), torch.tensor([0, 1] * 4)
    assert stored_data.best(value, label).tolist() == [6, 3]
