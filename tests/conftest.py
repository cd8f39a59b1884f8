"""What tests of the application share: one root whose cache holds the tiny base model and the classifiers."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: bits of a run are those of one thread

import pytest
from processes import rlfusion
from tiny_runs import TINY


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A root with one finished run, ``first``, and a full cache."""
    cwd = tmp_path_factory.mktemp("app")
    result = rlfusion(cwd, "finetune", "--root", cwd / "runs", "--name", "first", *TINY)
    assert result.code == 0, result.err
    return cwd / "runs"


@pytest.fixture(scope="session")
def classifiers(tiny_root) -> list[Path]:
    """The cached judge and reward classifier, to be linked into other roots."""
    return sorted((tiny_root / "cache").glob("classifier-*"))


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory) -> dict[str, Path]:
    """The folder of a tiny random pipeline of each family, by its name in ``tiny_pipelines.MAKERS``."""
    import torch
    from tiny_pipelines import MAKERS

    root = tmp_path_factory.mktemp("pipelines")
    for name, make in MAKERS.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make().save_pretrained(root / name)
    return {name: root / name for name in MAKERS}
