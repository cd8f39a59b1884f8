"""States that do not fit what they are loaded into: every learner says so in one typed error that names the entry."""

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distilled import settings_of, teaching
from learned_agents import SHAPE, images, learned

from rlfusion import models, pretrain
from rlfusion.agents import AGENTS
from rlfusion.common.errors import StateError
from rlfusion.distill import METHODS
from rlfusion.jobs import distill
from rlfusion.models import Config
from rlfusion.pretrain.losses import LOSSES
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.guard import Guarded
from rlfusion.rl.monitor import Config as Monitoring
from rlfusion.rl.run_monitor import RunMonitor


def agent(name: str) -> Any:
    """A learner of an algorithm after its first update."""
    return learned(name)[0]


def method(name: str, folder: Path) -> Any:
    """A learner of a distillation method after its first update, and after its teacher has made pairs, if it does."""
    settings = settings_of(name)
    given = teaching(settings, folder=folder)
    learner = distill.make_learner(settings, given)
    learner.update(next(iter(distill.batches(settings, given, 0))))
    return learner


KINDS = {
    "Denoising": ("v", "Cosine()"),
    **dict.fromkeys(("ESM", "ISM", "SSM"), ("eps", "VP()")),
    **dict.fromkeys(("CT", "ICT"), ("CM(sigma_data=0.75)", "Karras()")),
    "SCT": ("TrigFlow()", "Trig()"),
}
"""What a network predicts, and on which schedule, by the objective that it is trained with."""


def pretraining(loss: str) -> Any:
    """A learner of an objective of pretraining after its first update."""
    kind, schedule = KINDS[loss]
    config = Config("ResidualMLP(width=4, depth=1)", schedule, kind)
    denoiser = models.build(models.Card(config, SHAPE, ("a", "b")), 0)
    learner = pretrain.Learner(denoiser, images(), pretrain.Config(f"{loss}()", steps=4, batch=4, warmup=1), 0)
    learner.update(0)
    return learner


def guarded() -> Guarded:
    """A guarded learner after a good update."""
    made = Guarded(agent("ddpo"), Guards(action="rollback"), None)
    made._accept({"grad_norm": 1.0, "reward": 1.0, "reward_std": 0.5})
    return made


def monitor(folder: Path) -> RunMonitor:
    """The monitor of a run after its first look."""
    made = RunMonitor(
        Monitoring(best="reward"),
        4,
        folder,
        lambda: images().x,
        lambda: (images().x, None),
        lambda x: None,
        lambda: None,
    )
    made.begin()
    made.best.take(1, {"reward": 0.5}, alarmed=False)
    return made


LEARNERS: dict[str, Callable[[Path], Any]] = {
    **{f"agent {name}": lambda folder, name=name: agent(name) for name in AGENTS},
    **{f"method {name}": lambda folder, name=name: method(name, folder) for name in METHODS},
    **{f"objective {name}": lambda folder, name=name: pretraining(name) for name in KINDS},
    "guard": lambda folder: guarded(),
    "monitor": monitor,
}


def places(state: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every entry of nested mappings, outer ones first."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield (*path, key)
            yield from places(value, (*path, key))


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "text": lambda value: "x",
    "none": lambda value: None,
    "a list": lambda value: [1, 2],
    "a dict": lambda value: {"odd": 1},
    "another shape": lambda value: torch.zeros(7, 3, 1) if not isinstance(value, torch.Tensor) else value[None],
    "another dtype": lambda value: (
        value.to(torch.float16 if value.dtype != torch.float16 else torch.int8)
        if isinstance(value, torch.Tensor)
        else complex(1)
    ),
}
GONE, MORE = "missing", "one more"


def bent(state: dict, path: tuple, damage: str) -> dict:
    out = copy.deepcopy(state)
    *above, last = path
    held = out
    for key in above:
        held = held[key]
    if damage == GONE:
        del held[last]
    elif damage == MORE:
        held[f"{last}_"] = held[last]
    else:
        held[last] = DAMAGES[damage](held[last])
    return out


@pytest.mark.parametrize("name", LEARNERS)
def test_a_state_that_does_not_fit_is_named(name, tmp_path):
    learner = LEARNERS[name](tmp_path)
    state = copy.deepcopy(learner.state_dict())
    found = list(places(state))
    draw = random.Random(name)
    for damage in (GONE, MORE, *DAMAGES):
        for path in draw.sample(found, min(5, len(found))):
            if damage == GONE and path[-2:-1] in (("state",), ("history",)):
                continue  # a parameter without a gradient has no moments, a prompt that never came no rewards
            if damage == "text" and path in ((("drawn",), ("best", "name"))):
                continue  # which are texts
            with pytest.raises(StateError) as caught:
                learner.load_state_dict(bent(state, path, damage))
            text = str(caught.value)
            assert damage == "a dict" or any(str(key) in text for key in path), (path, damage, text)
            assert "\n" not in text
    learner.load_state_dict(state)


def test_every_objective_of_pretraining_is_tried():
    assert KINDS.keys() == set(LOSSES.names())


def test_what_a_guard_would_go_back_to_is_a_state_of_its_learner():
    learner = guarded()
    state = learner.state_dict()
    (good,) = state["guard"]["good"]
    for odd in ([1, 2], [{}], [good, "x"], [good | {"more": 1}]):
        with pytest.raises(StateError, match="one of the guard's 'good' states"):
            learner.load_state_dict(state | {"guard": state["guard"] | {"good": odd}})
    learner.load_state_dict(state)
