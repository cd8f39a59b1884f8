"""The registry: what a name may be, what is said where it is nothing, what is written down of it."""

import hashlib
from pathlib import Path
from typing import Protocol

import pytest

from rlfusion.agents import AGENTS
from rlfusion.common import code_files, registry, spec
from rlfusion.common.code_files import absolute, files_of, label
from rlfusion.common.errors import ConfigError, UserCodeError
from rlfusion.common.registry import Registry
from rlfusion.diffusion.chain import KERNELS
from rlfusion.diffusion.parameterization import KINDS
from rlfusion.distill import METHODS
from rlfusion.models import NETS, SCHEDULES
from rlfusion.pretrain import LOSSES
from rlfusion.rewards.registry import REWARDS

ALL = [AGENTS, KERNELS, KINDS, METHODS, NETS, SCHEDULES, LOSSES, REWARDS]


class Shape(Protocol):
    def area(self) -> float: ...


THINGS = Registry("thing", "rlfusion.things", {"Counter": "collections:Counter", "Path": "pathlib:Path"}, Shape)

SQUARE = """
'''A file of shapes.'''
from dataclasses import dataclass

@dataclass(frozen=True)
class Square:
    '''A square.

    And more.
    '''
    side: float = 1.0

    def area(self):
        return self.side ** 2

    def __post_init__(self):
        if self.side == 3:
            raise KeyError("three")

def twice(side: float = 1.0):
    return Square(2 * side)

class Line:
    pass

UNIT = Square()
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("shapes.py").write_text(SQUARE)
    return tmp_path


def installed(folder: Path, name: str, points: str, module: str = SQUARE) -> None:
    """A package with one module, as pip would install it into ``folder``."""
    (folder / f"{name}.py").write_text(module)
    info = folder / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text(points)


@pytest.mark.parametrize("table", ALL, ids=lambda table: table.what.replace(" ", "_"))
def test_everything_built_in_is_found_in_any_case_and_has_a_line_that_says_what_it_is(table):
    rows = {row.name: row for row in table.rows() if row.source == registry.BUILT_IN}
    assert set(rows) == set(table)
    for name in table:
        found = table.find(name.upper() if table is not KINDS else name)
        assert (found.name, found.ours, found.digest) == (name, True, "")
        assert found.object is table[name]
    assert table is KINDS or all(row.about not in ("", "Args:", "Attributes:") for row in rows.values()), rows


def test_a_file_gives_classes_functions_and_things_that_are_made(there):
    path = there / "shapes.py"
    found = THINGS.find("shapes.py:Square")
    assert (found.name, found.source) == (f"{path}:Square", str(path))
    assert found.digest == hashlib.sha256(SQUARE.encode()).hexdigest()
    areas = {"Square(side=2.0)": 4.0, "Square": 1.0, "UNIT": 1.0}
    for text, area in areas.items():
        assert spec.parse(f"shapes.py:{text}", THINGS, "thing").area() == area
        assert spec.parse(f"./shapes.py:{text}", THINGS, "thing").area() == area
        assert spec.parse(f"{path}:{text}", THINGS, "thing").area() == area


def test_a_module_and_an_entry_point(there, monkeypatch):
    installed(there, "acme", "[rlfusion.things]\nsquare = acme:Square\nhalf = acme:Half\n")
    monkeypatch.syspath_prepend(there)
    assert spec.parse("acme:Square(side=2)", THINGS, "thing").area() == 4
    found = THINGS.find("SQUARE")
    assert (found.name, found.source, found.digest) == ("square", "acme 1.5", "")
    assert spec.parse("square(side=3.5)", THINGS, "thing").area() == 3.5**2
    assert THINGS.names() == ["Counter", "Path", "square", "half"]
    rows = {row.name: row for row in THINGS.rows()}
    assert rows["square"] == ("square", "acme 1.5", "A square.")
    assert rows["half"].source == "not usable"
    assert "acme" in rows["half"].about


@pytest.mark.parametrize(
    ("points", "name", "said"),
    [
        ("counter = acme:Square\n", "Counter", ["built in (collections:Counter)", "acme 1.5 (acme:Square)"]),
        ("cube = acme:Square\nCube = acme:Line\n", "cube", ["(acme:Square)", "(acme:Line)"]),
    ],
)
def test_two_things_of_one_name_are_refused_with_the_names_that_tell_them_apart(there, monkeypatch, points, name, said):
    installed(there, "acme", f"[rlfusion.things]\n{points}")
    monkeypatch.syspath_prepend(there)
    with pytest.raises(ConfigError, match="is the name of 2 things") as caught:
        THINGS.find(name)
    assert all(part in str(caught.value) for part in said), caught.value
    assert THINGS.find("Path").ours
    assert THINGS.find("collections:Counter").object is THINGS["Counter"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Contre", ["unknown thing 'Contre'", "did you mean 'Counter'?", "path/to/file.py:name", "rlfusion.things"]),
        ("shapes.py", ["shapes.py:Name"]),
        ("acme.Square", ["acme:Square"]),
        ("shape.py:Square", ["no file", "did you mean 'shapes.py'?", "from the folder"]),
        ("shapes.py:Sqare", ["'Sqare'", "did you mean 'Square'?"]),
        ("shapes.py:", ["expected package.module:name"]),
        ("shapes.py:Square(sied=1)", ["'sied'", "did you mean 'side'?"]),
        ("shapes.py:Square(side='a')", ["side = a", "expected float"]),
        ("shapes.py:UNIT(side=1)", ["has no settings"]),
        ("shapes.py:Line", ["without area", "Shape"]),
        ("shapes.py:dataclass", ["without area"]),
        ("shapes.py:twice(side=2.0)", ["is of function, without area"]),
        ("subprocess:run(args='exit')", ["is of function, without area"]),
        ("subprocess:Popen(args='exit')", ["is the class Popen, without area"]),
        ("broken.py:Square", ["cannot be loaded", "SyntaxError"]),
        ("needing.py:Square", ["cannot be loaded", "absent_library", "line 2"]),
        ("no_such_package:Square", ["no module 'no_such_package'"]),
    ],
)
def test_what_cannot_be_found_or_made_is_one_line(there, text, said):
    Path("broken.py").write_text("def f(:\n")
    Path("needing.py").write_text("\nimport absent_library\n")
    with pytest.raises(ConfigError) as caught:
        spec.parse(text, THINGS, "thing")
    assert all(part in str(caught.value) for part in said), caught.value
    assert "\n" not in str(caught.value)


def test_names_that_a_file_only_imports_are_not_offered(there):
    with pytest.raises(ConfigError, match=r"'shapes.py' 'Sqare': expected one of Line, Square, UNIT, twice; did you"):
        spec.parse("shapes.py:Sqare", THINGS, "thing")


def test_names_that_a_module_says_are_its_own_are_offered(there, monkeypatch):
    """A package gives what its modules define: torch.optim says NAdam, of torch.optim.nadam."""
    monkeypatch.syspath_prepend(there)
    Path("oval_inner.py").write_text("class Oval:\n    pass\n")
    lines = ["import math", "from oval_inner import Oval", "__all__ = ['Oval', 'math']", "class Inside: pass", ""]
    Path("oval_outer.py").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"'Ovla': expected one of Oval; did you mean 'Oval'"):
        spec.parse("oval_outer:Ovla", THINGS, "thing")


def test_a_stranger_s_own_error_is_theirs_with_its_line(there):
    with pytest.raises(UserCodeError, match=r"KeyError: 'three' \(shapes.py, line 18"):
        spec.parse("shapes.py:Square(side=3)", THINGS, "thing")


def test_an_edited_file_is_another_module_and_another_digest(there):
    first, before = THINGS.find("shapes.py:Square"), files_of({"a": ["shapes.py:Square(side=1)"], "b": "DDIM()"})
    assert before == {first.source: first.digest}
    Path("shapes.py").write_text(SQUARE.replace("** 2", "** 3"))
    second = THINGS.find("shapes.py:Square")
    assert second.digest != first.digest
    assert (first.object(2.0).area(), second.object(2.0).area()) == (4, 8)
    assert files_of("shapes.py:Square") == {first.source: second.digest}
    Path("shapes.py").unlink()
    assert files_of("shapes.py:Square") == {first.source: "absent"}


def test_a_process_elsewhere_makes_a_thing_of_the_text_that_it_got(there, monkeypatch):
    texts = code_files.texts_of({"kernel": "shapes.py:Square(side=2)"})
    assert texts == {str(there / "shapes.py"): SQUARE}
    Path("shapes.py").unlink()
    monkeypatch.setattr(code_files, "_RECEIVED", {})
    code_files.receive(texts)
    assert spec.parse(f"{there}/shapes.py:Square(side=2)", THINGS, "thing").area() == 4


@pytest.mark.parametrize(
    ("text", "whole", "short"),
    [
        ("DDIM(eta=1.0)", "DDIM(eta=1.0)", "DDIM"),
        ("a.b:C(x=1)", "a.b:C(x=1)", "C"),
        ("my.py:K(path='b.py:c')", "{here}/my.py:K(path='b.py:c')", "K"),
        ("d/../my.py:K", "{here}/my.py:K", "K"),
        ("folder(path='x.py:y')", "folder(path='x.py:y')", "folder"),
        ("my.py", "my.py", "my.py"),
        ("mine = my.py:K(x=1)", "mine = my.py:K(x=1)", "K"),
        ("grpo", "grpo", "grpo"),
    ],
)
def test_a_file_is_written_down_with_its_path_from_the_root(there, text, whole, short):
    assert absolute(text) == whole.format(here=there)
    assert absolute(absolute(text)) == absolute(text)
    assert label(text) == short
