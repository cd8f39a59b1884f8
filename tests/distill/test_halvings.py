"""Four halvings of progressive distillation, 32 steps to 2, on a Gaussian, in float64: every round against closed form.

The teacher's DDIM step on N(M, LAM) is affine, and a table of affine answers, a row for each of the 32 times, can hold
every round's student. A row that no round has taught is far off, so a grid, a teacher or an average that is not the
right round's shows.
"""

import copy
from pathlib import Path

import pytest
import torch
from gaussian_teacher import DOUBLE, Gaussian, Table, draw_of

from rlfusion.data import Dataset
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.distill import Teaching, pd
from rlfusion.distill.ode import along
from rlfusion.models import Card, Config

START, STEPS, ROUNDS = 32, 2, 4
CARD = Card(Config("ResidualMLP()", "Cosine()", "x0"), (1, 1, 1), ("all",))


def begun(updates: int) -> tuple[pd.Config, Teaching]:
    held = draw_of(2000)
    data = Dataset(held.x0, torch.zeros(2000, dtype=torch.int64), ("all",))
    student, teacher = Denoiser(Table(START), Cosine(), "x0"), Gaussian(Cosine(), "x0").double()
    chain = Chain(steps=STEPS, kernel="DDIM(eta=0.0)")
    settings = pd.Config(
        steps=updates, start=START, batch=128, lr=0.1, warmup=0, ema="Constant(decay=0.95)", max_grad_norm=1e4
    )
    return settings, Teaching(teacher, teacher, student, CARD, CARD, chain, data, 0.0, 0, Path())


def affine(denoiser: Denoiser, steps: int) -> torch.Tensor:
    """(slope, offset) of the map of a DDIM chain of ``steps``, from noise to data."""
    x = torch.tensor([0.0, 1.0], dtype=DOUBLE).reshape(2, 1, 1, 1)
    times = [torch.full((2,), 1 - k / steps, dtype=DOUBLE) for k in range(steps + 1)]
    offset, end = along(denoiser, x, times, None).flatten().detach()
    return torch.stack([end - offset, offset])


def test_every_halving_keeps_the_map_of_the_teachers_chain():
    settings, teaching = begun(100)
    learner, wanted = settings.learner(teaching), affine(teaching.teacher, START)
    assert (settings.total(teaching), len(learner.stages)) == (ROUNDS * 100, ROUNDS)
    seen = []
    for n, batch in enumerate(settings.batches(teaching, 0), 1):
        learner.update(batch)
        if n % 100 == 0:
            with learner.optimization.ema.averaged():
                seen.append(affine(teaching.student, START >> len(seen) + 1))
    assert len(seen) == ROUNDS
    for found in seen:
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-3)
    skipped = affine(teaching.teacher, STEPS)
    assert (skipped - wanted).abs().max() > 0.2, "the teacher's own 2 steps end elsewhere"


def test_each_round_is_taught_by_the_student_of_the_one_before_on_half_its_grid():
    settings, teaching = begun(2)
    learner, before = settings.learner(teaching), None
    for n, batch in enumerate(settings.batches(teaching, 0)):
        learner.update(batch)
        assert learner.at == n // 2
        loss = learner.learner.loss
        assert loss.grid.tolist() == [1 - k / (START >> learner.at) for k in range((START >> learner.at) + 1)]
        if n % 2 == 0 and before is not None:
            assert all(torch.equal(p, before[name]) for name, p in loss.teacher.state_dict().items())
        if n < 2:
            assert loss.teacher is teaching.teacher
        with learner.optimization.ema.averaged():
            before = copy.deepcopy(teaching.student.state_dict())


@pytest.mark.parametrize("stop", range(1, 2 * ROUNDS))
def test_a_run_stopped_in_any_round_or_between_two_ends_with_the_same_bits(stop):
    settings, teaching = begun(2)
    whole = settings.learner(teaching)
    batches = list(settings.batches(teaching, 0))
    for n, batch in enumerate(batches):
        if n == stop:
            state = copy.deepcopy(whole.state_dict())
        whole.update(batch)
    settings, again = begun(2)
    other = settings.learner(again)
    other.load_state_dict(state)
    rest = list(settings.batches(again, stop))
    assert rest == batches[stop:]
    for batch in rest:
        other.update(batch)
    for end in (whole, other):
        end.optimization.ema.settle()
    assert all(torch.equal(p, q) for p, q in zip(teaching.student.parameters(), again.student.parameters()))
