"""The page of what saturates first is what its script prints; the script's formulas against numbers by hand."""

import importlib.util
import sys

import pytest
from house import ROOT


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    module = sys.modules["scaling"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling"]


MODEL = {"parameters": 10**9, "adapters": 10**7, "latent": 10**4, "forward": 10**12, "backward": 2 * 10**12}
MODEL |= {"pixels": 64, "activations": 10**10, "checkpointed": 10**9}


def test_the_page_has_the_tables_of_the_script(scaling):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.placed(page) == page
    assert len(scaling.tables()) == 4


def test_the_memory_of_a_rank(scaling):
    lora, whole = scaling.kinds(MODEL)
    assert (whole.state, whole.beside) == (16e9, 28e9)
    assert (lora.state, lora.beside) == (16e7 + 2e9, 28e7)
    assert scaling.room(whole, MODEL, 8) == (False, 28)  # (72 - 44) / 1
    big = scaling.kinds(MODEL | {"parameters": 4 * 10**9})[1]
    assert scaling.room(big, MODEL, 8) == (True, 50)  # 72 - 176 / 8
    assert scaling.room(big, MODEL, 2) == (True, 0)


def test_what_goes_over_the_wire(scaling):
    lora, whole = scaling.kinds(MODEL)
    assert scaling.wire(whole, 8, "replicated") == 7e9
    assert scaling.wire(whole, 8, "exact") == 28e9
    assert scaling.wire(whole, 8, "sharded") == 10.5e9
    assert scaling.wire(lora, 8, "sharded") == pytest.approx(7 / 8 * (2 * (4e7 + 2e9) + 4e7))


def test_the_seconds_of_an_update(scaling):
    took = scaling.spent(scaling.kinds(MODEL)[1], MODEL, 64)
    rows = 2 * 64 * 24 * 10
    assert took["rollout"] == pytest.approx(rows * 1e12 / (64 * 9.89e14 * 0.4))
    assert took["learning"] == pytest.approx(4 * took["rollout"])
    assert took["wire"] == pytest.approx(2 * 2 * 63 / 64 * 4e9 / 50e9)
    assert took["publishing"] == pytest.approx(4e9 / 50e9)
    assert scaling.spent(scaling.kinds(MODEL | {"parameters": 10**11})[1], MODEL, 8) == {}
