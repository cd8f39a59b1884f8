"""What tests of the application share: one root whose cache holds the tiny base model and the classifiers."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: bits of a run are those of one thread

import pytest
from filelock import FileLock
from processes import rlfusion
from tiny_runs import TINY

LONG = ("learning", "faults", "test_docs", "jobs", "distill", "agents", "models")
"""Folders, and files, that take longest. They begin first, so that no process of a parallel run ends alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: min(rank.get(name, len(LONG)) for name in (item.path.stem, item.path.parent.name)))


def shared(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder that ``fill`` makes, once for all processes of a parallel run: the first makes it, others wait."""
    base = factory.getbasetemp()
    place = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = place / name, place / f"{name}.done"
    with FileLock(place / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            fill(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A root with one finished run, ``first``, and a full cache. Tests add runs to it, each file of other names."""

    def fill(cwd: Path) -> None:
        result = rlfusion(cwd, "finetune", "--root", cwd / "runs", "--name", "first", *TINY)
        assert result.code == 0, result.err

    return shared(tmp_path_factory, "app", fill) / "runs"


@pytest.fixture(scope="session")
def with_classifiers(tiny_root) -> Callable[[Path], Path]:
    """``with_classifiers(root)`` links the judge and the reward classifier of the digits into a root's cache, which
    would take seconds each to train. It gives the cache."""

    def link(root: Path) -> Path:
        (root / "cache").mkdir(parents=True)
        for file in (tiny_root / "cache").glob("classifier-*"):
            (root / "cache" / file.name).symlink_to(file)
        return root / "cache"

    return link


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory) -> dict[str, Path]:
    """The folder of a tiny random pipeline of each family, by its name in ``tiny_pipelines.MAKERS``."""
    from tiny_pipelines import MAKERS

    return _saved(tmp_path_factory, "pipelines", MAKERS)


@pytest.fixture(scope="session")
def newer_pipelines(tmp_path_factory) -> dict[str, Path]:
    """The same of ``tiny_pipelines.NEWER``."""
    from tiny_pipelines import NEWER

    return _saved(tmp_path_factory, "newer-pipelines", NEWER)


def _saved(factory: pytest.TempPathFactory, folder: str, makers: dict[str, Callable]) -> dict[str, Path]:
    import torch

    def fill(root: Path) -> None:
        for name, make in makers.items():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                make().save_pretrained(root / name)

    root = shared(factory, folder, fill)
    return {name: root / name for name in makers}
