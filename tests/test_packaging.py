"""What is installed is what is here: the wheel, built from a copy of the checkout, stands without it."""

import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from rlfusion.jobs.launch.wheel import files

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = ("envs", "rewards", "agents")
FOLDERS = ("rlfusion", *TOP)


def package(path: Path) -> str:
    """The import name of a folder of the checkout."""
    parts = path.relative_to(ROOT).parts
    return ".".join(parts if parts[0] == "rlfusion" else ("rlfusion", *parts))


def sources() -> set[str]:
    """Every file that a wheel must hold, by its path in the wheel."""
    there = (f for top in FOLDERS for f in (ROOT / top).rglob("*"))
    held = (f for f in there if f.suffix in (".py", ".txt", ".html") or f.name == "py.typed")
    return {"/".join((*package(f.parent).split("."), f.name)) for f in held}


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_declared_packages_are_the_folders_on_disk():
    on_disk = {package(init.parent) for top in FOLDERS for init in (ROOT / top).rglob("__init__.py")}
    assert sorted(on_disk) == PROJECT["tool"]["setuptools"]["packages"]
    with_code = {package(f.parent) for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    assert with_code == on_disk, "a folder of code without __init__.py"
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    assert mapped == {"rlfusion": "rlfusion", **{f"rlfusion.{top}": top for top in TOP}}


def test_the_top_folders_hold_no_other_folders_than_these():
    inside = {d.relative_to(ROOT).as_posix() for top in TOP for d in (ROOT / top).iterdir() if d.is_dir()}
    assert {d for d in inside if not d.endswith("__pycache__")} == {"rewards/clip", "rewards/kit", "rewards/remote"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel that was built from the sdist, from a copy without what git ignores."""
    source, out = tmp_path_factory.mktemp("source") / "rlfusion", tmp_path_factory.mktemp("dist")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for top in (*FOLDERS, "tests"):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    return out


def test_the_wheel_holds_every_source_file_and_no_other(dist):
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    assert held == sources()
    assert {"rlfusion/py.typed", "rlfusion/envs/denoising.py", "rlfusion/rewards/jpeg.py"} < held
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_what_a_job_takes_along_is_the_wheel(dist):
    """``rlfusion launch`` packs the same files, from a checkout as from an installation, without a build."""
    (wheel,) = dist.glob("*.whl")
    built, packed = zipfile.ZipFile(wheel), files()
    differs = {"RECORD", "WHEEL", "METADATA", "top_level.txt", "LICENSE"}
    names = {name for name in built.namelist() if name.rpartition("/")[2] not in differs}
    assert {name for name in packed if name.rpartition("/")[2] not in differs} == names
    assert all(packed[name].strip() == built.read(name).strip() for name in names)


def test_the_sdist_holds_the_tests_too(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f.relative_to(ROOT).as_posix() for top in FOLDERS for f in (ROOT / top).rglob("*.py")}
    assert {*wanted, "pyproject.toml", "LICENSE", "README.md", "rlfusion/py.typed"} <= names


IMPORT_ALL = """
import importlib, pkgutil, sys
import rlfusion
names = ["rlfusion", *(m.name for m in pkgutil.walk_packages(rlfusion.__path__, "rlfusion."))]
for name in names:
    print(name, importlib.import_module(name).__file__)
"""


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """A fresh environment that holds the wheel alone, and sees the dependencies of this one but not its rlfusion."""
    env = tmp_path_factory.mktemp("env")
    venv.create(env, with_pip=False, symlinks=True)
    (library,) = (env / "lib").glob("python*/site-packages")
    borrowed = env / "borrowed"
    borrowed.mkdir()
    for entry in (e for folder in site.getsitepackages() for e in Path(folder).iterdir()):
        if not re.search(r"rlfusion|\.pth$|^_virtualenv", entry.name) and not (borrowed / entry.name).exists():
            (borrowed / entry.name).symlink_to(entry)
    (library / "borrowed.pth").write_text(str(borrowed))
    (wheel,) = dist.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(library)
    return env


def test_every_module_imports_from_the_wheel_alone(installed, tmp_path):
    lines = run(installed / "bin" / "python", "-I", "-c", IMPORT_ALL, cwd=tmp_path).splitlines()
    found = dict(line.split() for line in lines if line.startswith("rlfusion"))
    code = [Path(name) for name in sources() if name.endswith(".py")]
    assert set(found) == {".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in code}
    assert all(Path(path).is_relative_to(installed) for path in found.values())
    assert ROOT.as_posix() not in " ".join(found.values())


def test_the_command_of_the_wheel_is_the_function(dist):
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "rlfusion = rlfusion.cli.main:main" in archive.read(entry).decode()
