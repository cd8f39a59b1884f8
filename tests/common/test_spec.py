"""Settings written as text: what is read, and what is refused in one line."""

from dataclasses import dataclass

import pytest

from rlfusion.common import spec
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.kernel import DDIM, DDPM
from rlfusion.diffusion.schedule import Cosine


@dataclass(frozen=True)
class Box:
    side: float
    color: str = "red"

    def __post_init__(self) -> None:
        if self.side < 0:
            raise ConfigError(f"side = {self.side}: expected a number >= 0")


TABLE = {"Box": Box, "DDIM": DDIM, "DDPM": DDPM, "Cosine": Cosine}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DDIM", ("DDIM", {})),
        ("DDIM()", ("DDIM", {})),
        (" DDIM ( eta = 0.5 ) ", ("DDIM ", {"eta": 0.5})),
        (
            "Net(widths=(1, 2), name='a(b)', deep={'x': [0]})",
            ("Net", {"widths": (1, 2), "name": "a(b)", "deep": {"x": [0]}}),
        ),
        ("N(x=-1e-3)", ("N", {"x": -1e-3})),
    ],
)
def test_a_name_and_its_literals_are_read(text, expected):
    name, settings = spec.split(text)
    assert (name.strip(), settings) == (expected[0].strip(), expected[1])


@pytest.mark.parametrize(
    "text",
    [
        *("DDIM(0.5)", "DDIM(eta=)", "DDIM(eta=0.5", "DDIM(**x)", "DDIM(eta=1, eta=2)", "DDIM()()", "DDIM(x=1)(x=2)"),
        *("DDIM().x", "DDIM(eta=open('f'))", "DDIM(x=__import__('os'))", "DDIM(x=1) + 1", "DDIM(x=1)\nimport os"),
    ],
)
def test_anything_else_is_refused_and_never_evaluated(text):
    with pytest.raises(ConfigError, match="expected Name or Name"):
        spec.split(text)


@pytest.mark.parametrize("made", [DDIM(eta=0.25), DDPM(variance="large"), Cosine(), Box(2.0, "blue")])
def test_a_dataclass_is_read_back_from_its_repr(made):
    assert spec.parse(repr(made), TABLE, "thing") == made


def test_names_are_found_in_any_case():
    assert spec.parse("ddim(eta=0.5)", TABLE, "thing") == DDIM(eta=0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DDIN()", ["unknown thing 'DDIN'", "did you mean 'DDIM'?"]),
        ("Box(sidee=1)", ["setting of thing 'Box'", "'sidee'", "did you mean 'side'?"]),
        ("Box()", ["thing 'Box'", "side"]),
        ("Box(side=-1)", ["side = -1"]),
        ("Box(side='x')", ["side = x of thing 'Box'", "expected float"]),
    ],
)
def test_errors_name_what_is_wrong(text, said):
    with pytest.raises(ConfigError) as caught:
        spec.parse(text, TABLE, "thing")
    assert all(part in str(caught.value) for part in said), caught.value
