"""Packages that are imported at their first use."""

import gc
import importlib.util
import os
import subprocess
import sys

import pytest

from rlfusion.common.deferred import Deferred, deferred, uncollected

CODE = "import sys\nloaded = True\nclass Thing: pass\ndef double(x, *, plus=0): return 2 * x + plus\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a module, none of which is imported."""
    folder = tmp_path / "heavy_thing"
    folder.mkdir()
    (folder / "__init__.py").write_text(CODE)
    (folder / "inner.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "heavy_thing"
    for name in [n for n in sys.modules if n.split(".")[0] == "heavy_thing"]:
        del sys.modules[name]


def test_the_first_use_imports_it(package):
    with deferred(package):
        import heavy_thing as kept
    assert isinstance(kept, Deferred)
    assert package not in sys.modules
    assert kept.Thing is sys.modules[package].Thing
    assert not isinstance(sys.modules[package], Deferred)


def test_a_module_of_a_package(package):
    with deferred(f"{package}.inner"):
        import heavy_thing.inner
    import heavy_thing as whole

    assert f"{package}.inner" not in sys.modules
    from heavy_thing.inner import value

    assert value == 3
    assert whole.inner.value == 3


def test_a_use_within_the_block_imports_it(package):
    with deferred(package):
        from heavy_thing import Thing
    assert Thing is sys.modules[package].Thing


def test_after_the_block_imports_are_as_ever(package):
    with pytest.raises(KeyError), deferred(package):
        raise KeyError
    import heavy_thing.inner

    assert heavy_thing.loaded
    assert heavy_thing.inner.value == 3


def test_what_is_imported_already_or_not_installed_is_left_alone(package):
    import heavy_thing

    with deferred(package, "no_such_thing_anywhere", "no_such_thing_anywhere.inner"):
        import heavy_thing as again

        with pytest.raises(ModuleNotFoundError):
            import no_such_thing_anywhere  # noqa: F401
    assert again is heavy_thing


def test_a_package_that_is_installed_is_found_within(package):
    import importlib.util

    with deferred(package):
        found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin.endswith("__init__.py")


def test_a_function_is_imported_as_it_is_called(package):
    with deferred(f"{package}:double"):
        from heavy_thing import double
    assert package not in sys.modules
    assert double(2, plus=1) == 5
    assert sys.modules[package].loaded


def test_another_name_of_its_package_imports_it(package):
    with deferred(f"{package}:double"):
        from heavy_thing import Thing
    assert Thing is sys.modules[package].Thing


def test_no_garbage_is_looked_for_while_a_library_is_imported():
    looked = []
    gc.collect()
    gc.callbacks.append(lambda phase, about: looked.append(about["generation"]))
    try:
        with uncollected():
            held = [[] for _ in range(10 * gc.get_threshold()[0])]
            assert not gc.isenabled()
        assert gc.isenabled()
        assert not looked
        assert gc.get_freeze_count() == 0
        assert gc.get_count()[0] < gc.get_threshold()[0]
        assert any(held[0] is one for one in gc.get_objects(generation=2))  # it is old, and still looked at
    finally:
        gc.callbacks.pop()


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.alone
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_pipelines_library_begins_without_what_it_seldom_uses(tmp_path):
    """Of a process of its own: this one has imported them long ago."""
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDIMScheduler"}')
    index = '{"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}'
    (tmp_path / "model_index.json").write_text(index)
    code = (
        "import sys\nfrom rlfusion.models.pipelines import hub\n"
        "hub.class_named('StableDiffusionPipeline'), hub.class_named('StableDiffusion3Pipeline')\n"
        f"from pathlib import Path\nhub.scheduler(Path({str(tmp_path)!r}))\n"
        "from rlfusion.common.deferred import RARE\n"
        "assert not {name.partition(':')[0] for name in RARE} & set(sys.modules)\n"
        "made = hub.class_named('DPMSolverMultistepScheduler')(use_beta_sigmas=True)\n"
        "made.set_timesteps(3)\nassert 'scipy.stats' in sys.modules\nimport bitsandbytes.optim\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_is_forked_meanwhile_looks_for_garbage():
    code = (
        "import gc, os\n"
        "from rlfusion.common.deferred import uncollected\n"
        "def looks():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(10 + gc.isenabled())\n"
        "    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 11\n"
        "with uncollected():\n"
        "    assert not gc.isenabled() and looks()\n"
        "assert gc.isenabled() and looks()\n"
        "gc.disable()\n"
        "assert not looks()\n"
        "with uncollected():\n"
        "    assert not looks()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
