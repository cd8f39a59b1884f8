"""Students of pairs: what the teacher makes of noise in many steps, they make in one; rounds, and what is refused."""

from dataclasses import replace

import pytest
import torch
from distilled import CARD, FEW, SHAPE, run, scrambled, settings_of, teaching
from rounding import ROUNDING
from torch import Tensor

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import unpack
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.distill import Student
from rlfusion.distill.pairs import Making
from rlfusion.jobs import distill

MAKING = Making(count=600, shard=300, steps=20)
LABEL = torch.arange(60) % 3


def ends(model, steps: int) -> Tensor:
    """(60, *SHAPE): where DDIM(0) in so many steps takes noise that no student has seen."""
    chain = Chain(steps=steps, kernel="DDIM(eta=0.0)")
    noise = chain_noise((9, "fresh"), range(60), steps, SHAPE)
    noise[:, 0] = chain_noise((9, "fresh"), range(60), 0, SHAPE)[:, 0]
    return sample(chain.policy(model, CARD.names), noise, chain.times(model), LABEL)


def error(found: Tensor, goal: Tensor) -> float:
    return (found - goal).square().mean().item()


@pytest.mark.parametrize(("name", "own", "share"), [("regression", {}, 0.2), ("reflow", {"rounds": 1}, 0.45)])
def test_a_student_makes_in_one_step_what_the_teacher_makes_in_many(name, own, share, tmp_path):
    """Reflow spreads its effort over all times, of which one step sees the first."""
    settings = settings_of(name, steps=500, batch=64, lr=5e-3, warmup=20, pairs=MAKING, **own)
    settings = replace(settings, chain=replace(settings.chain, steps=1))
    run(settings, CARD, tmp_path)
    teacher, student = scrambled(CARD), models.load(tmp_path)[0]
    goal = ends(teacher, MAKING.steps)
    assert error(ends(student, 1), goal) < share * error(ends(teacher, 1), goal)


def test_a_second_round_learns_from_the_student_of_the_first(tmp_path):
    settings = settings_of("reflow", rounds=2, steps=3, pairs=FEW)
    given = teaching(settings, CARD, tmp_path)
    learner = distill.make_learner(settings, given)
    for batch in distill.batches(settings, given, 0):
        if learner.done == 3 and learner.at == 0:
            with learner.optimization.ema.averaged():
                before = ends(given.student, FEW.steps)
        learner.update(batch)
    source = learner.learner.kept["source"]
    assert torch.equal(ends(source, FEW.steps), before)
    first, second = (pairs_of(tmp_path / f"pairs-{r}") for r in (1, 2))
    noise = torch.cat([first["eps"], second["eps"]]).flatten(1)
    assert len(noise.unique(dim=0)) == 2 * FEW.count  # no noise of a round in the other, nor twice in one
    policy = FEW.chain(0.0).policy(source, CARD.names)
    walk = torch.zeros(FEW.count, FEW.steps + 1, *SHAPE)
    walk[:, 0] = second["eps"]
    ended = sample(policy, walk, FEW.chain(0.0).times(source), second["label"])
    assert torch.allclose(ended, second["x0"], **ROUNDING)


def pairs_of(folder) -> dict[str, Tensor]:
    """All that the shards of a folder hold."""
    parts = [unpack(file.read_bytes()) for file in sorted(folder.glob("shard-*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_pairs_are_made_once_whatever_interrupts_the_run(tmp_path):
    settings = settings_of("reflow", rounds=2, steps=3, pairs=FEW)
    run(settings, CARD, tmp_path, stop=4)
    files = {f: f.stat().st_mtime_ns for f in sorted(tmp_path.glob("pairs-*/shard-*"))}
    assert len(files) == 6
    run(settings, CARD, tmp_path)
    assert {f: f.stat().st_mtime_ns for f in sorted(tmp_path.glob("pairs-*/*"))} | files == {
        f: f.stat().st_mtime_ns for f in sorted(tmp_path.glob("pairs-*/*"))
    }
    assert not list(tmp_path.glob("pairs-*/*.corrupt"))


def test_guidance_is_in_the_pairs(tmp_path):
    settings = settings_of("regression", pairs=FEW)
    plain = teaching(settings, CARD, tmp_path / "plain").pairs(FEW)()
    guided = teaching(replace(settings, guidance=2.0), CARD, tmp_path / "guided").pairs(FEW)()
    assert torch.equal(plain.eps, guided.eps)
    assert error(plain.x0, guided.x0) > 1e-3


@pytest.mark.parametrize(
    ("name", "settings", "steps", "said"),
    [
        ("regression", {"pairs": FEW}, 2, "chain.steps = 2: the student is a map of one step"),
        ("regression", {"pairs": Making(count=2)}, 1, "count = 2: expected a pair for each of the 3 classes"),
        ("reflow", {"pairs": Making(count=2)}, 4, "count = 2"),
        ("dmd", {"regression": 1.0, "pairs": Making(count=2)}, 4, "count = 2"),
        ("sds", {"form": "points"}, 2, "chain.steps = 2: points have no steps"),
    ],
)
def test_what_cannot_work_is_refused(name, settings, steps, said):
    given = settings_of(name, Student(init="random"), **settings)
    given = replace(given, chain=replace(given.chain, steps=steps))
    with pytest.raises(ConfigError, match=said):
        given.method.check(teaching(given))
