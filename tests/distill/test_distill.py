"""What every distillation shares: the teacher on another schedule, stages, the first weights, the job."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from backbones import NET, random_backbone
from distilled import CARD, SHAPE, held, run, scrambled, settings_of, small, teaching
from mixtures import Exact
from processes import rlfusion
from tiny_runs import TINY
from torch import nn

from rlfusion import config, models
from rlfusion.cli import arguments as command_line
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Denoiser, Embedded, Guided
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.kernel import CPS, DDIM, DDPM, FlowSDE, LastStepNoise, Renoise, transition
from rlfusion.diffusion.parameterization import Prediction
from rlfusion.diffusion.schedule import VP, Cosine, Karras, Rectified, Trig
from rlfusion.distill import METHODS, OnSchedule, Stage, Staged, Student, local_steps
from rlfusion.distill.ode import along
from rlfusion.distill.student import adopt, disagreement
from rlfusion.jobs import distill
from rlfusion.jobs.measure import draw
from rlfusion.pretrain.metrics import LPIPS

DOUBLE = torch.float64


def plane(n: int = 30) -> torch.Tensor:
    return torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)


@pytest.mark.parametrize("theirs", [VP(), Karras(), Rectified()], ids=repr)
@pytest.mark.parametrize("mine", [Cosine(), Rectified(), Trig(0.5)], ids=repr)
def test_a_teacher_answers_on_another_schedule_as_on_its_own(mine, theirs):
    teacher = OnSchedule(Exact(theirs, "x0"), mine)
    x, t = plane(), torch.linspace(0.05, 0.95, 30, dtype=DOUBLE)
    for at in (t, torch.tensor(0.3, dtype=DOUBLE)):
        ours, exact = teacher(x, at), Exact(mine, "x0")(x, at)
        torch.testing.assert_close(ours.x0, exact.x0, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours.eps, exact.eps, rtol=1e-6, atol=1e-6)


def test_schedules_that_end_far_apart_are_refused():
    with pytest.raises(ConfigError, match=r"expected ends within 0\.1"):
        OnSchedule(Exact(VP(0.1, 1.0), "x0"), Cosine())


P = Prediction(torch.ones(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("kernel", [DDIM(0.0), DDIM(1.0), DDPM(), CPS(), Renoise(), FlowSDE()], ids=repr)
def test_last_noise_gives_the_step_to_data_its_density_and_changes_no_other(kernel):
    schedule, ended = Cosine(), LastStepNoise(kernel, 0.1)
    t, s, end = (schedule(torch.tensor(at, dtype=DOUBLE)) for at in (0.8, 0.4, 0.0))
    dt = torch.tensor(-0.4, dtype=DOUBLE)
    assert ended.coefficients(t, s, dt) == kernel.coefficients(t, s, dt)
    law = transition(ended, P, s, end, dt)
    torch.testing.assert_close(law.mean, P.x0)
    x = P.x0 + 0.05
    torch.testing.assert_close(law.log_prob(x), Gaussian(P.x0, torch.tensor(0.1)).log_prob(x))
    assert transition(kernel, P, s, end, dt).log_prob(x).isnan().all()


def test_a_chain_takes_last_noise_where_it_is_needed_alone():
    student = scrambled(CARD)
    chain = Chain(steps=1, kernel="Renoise()", last_noise=0.2)
    policy = chain.policy(student, CARD.names)
    assert policy.stds(chain.times(student)).tolist() == [0.2]
    karras = scrambled(replace(CARD, config=replace(CARD.config, schedule="Karras()", kind="CM()")))
    Chain(steps=2, kernel="Renoise(floor=0.002)", last_noise=0.2).policy(karras, CARD.names)
    with pytest.raises(ConfigError, match=r"last_noise = 0\.2: the last step"):
        Chain(steps=2, kernel="Renoise()", last_noise=0.2).policy(karras, CARD.names)
    with pytest.raises(ConfigError, match="last_noise = -1"):
        Chain(last_noise=-1.0)


def test_a_network_that_reads_the_guidance_weight_begins_as_it_was_and_takes_it_from_the_chain():
    teacher, card = scrambled(CARD), replace(CARD, weights=(0.0, 4.0))
    student = models.build(card)
    adopt(student, teacher)
    x, t, label = torch.randn(5, *SHAPE), torch.tensor(0.4, dtype=DOUBLE), torch.arange(5) % 4
    for w in (0.0, 3.0):
        policy = Chain(guidance=w).policy(student, card.names)
        assert isinstance(policy.denoiser, Embedded)
        assert all(map(torch.equal, policy.denoiser(x, t, label), teacher(x, t, label)))
    student.net.label.weight[2].weight.data.normal_()
    assert not torch.equal(Embedded(student, 3.0)(x, t, label).x0, Embedded(student, 0.0)(x, t, label).x0)
    with pytest.raises(ConfigError, match=r"guidance = 5.0: this model reads .* 0.0 to 4.0 alone"):
        Chain(guidance=5.0).policy(student, card.names)
    with pytest.raises(ConfigError, match="no second answer"):
        Chain(guidance=2.0, guidance_rescale=0.5).policy(student, card.names)


@pytest.mark.parametrize("card", [replace(CARD, boundary="LCM(scaling=5.0)"), replace(CARD, weights=(0.0, 4.0))])
def test_a_distilled_model_comes_back_with_what_is_around_it(card, tmp_path):
    models.save(tmp_path, scrambled(card), card)
    loaded, found = models.load(tmp_path)
    assert found == card
    x, t = torch.randn(5, *SHAPE), torch.tensor(0.4, dtype=DOUBLE)
    policies = (Chain(guidance=0.0).policy(model, card.names) for model in (loaded, scrambled(card)))
    first, second = (policy.denoiser(x, t, torch.arange(5) % 3).x0 for policy in policies)
    assert torch.equal(first, second)
    assert isinstance(loaded, LCM) == bool(card.boundary)
    assert models.Card.from_json(json.loads(json.dumps(found.__dict__ | {"config": vars(found.config)}))) == card


def of(**changes) -> models.Card:
    return replace(CARD, config=replace(CARD.config, **changes))


def test_weights_are_taken_where_they_mean_the_same_alone():
    assert disagreement(CARD, CARD) == ""
    assert "student.kind" in disagreement(of(kind="flow"), CARD)
    assert "student.net" in disagreement(of(net="ResidualMLP(width=8)"), CARD)
    assert "student.schedule" in disagreement(of(schedule="Rectified()"), CARD)
    assert "guidance weight" in disagreement(CARD, replace(CARD, weights=(0.0, 1.0)))
    edm = of(kind="EDM(sigma_data=0.5)", schedule="Karras()")
    assert disagreement(of(kind="CM(sigma_data=0.5)", schedule="Karras()"), edm) == ""
    assert disagreement(of(kind="EDM(sigma_data=0.5)", schedule="VP()"), edm) == ""
    with pytest.raises(ConfigError, match=r"student.init = teacher: student.kind = 'flow'.*expected match"):
        teaching(settings_of("cd", Student(kind="flow")))


def test_guidance_is_built_into_what_the_student_learns_from():
    given = teaching(replace(settings_of("cd"), guidance=2.0))
    assert isinstance(given.teacher, Guided)
    assert given.teacher.weight == 2.0
    assert isinstance(given.unguided, Denoiser)
    assert not any(p.requires_grad for p in given.teacher.parameters())
    assert any(p.requires_grad for p in given.student.parameters())


def test_a_student_of_another_kind_and_schedule_learns_to_answer_as_the_teacher():
    student = Student(kind="flow", schedule="Rectified()", init="match", match=160, match_lr=2e-2)
    settings = settings_of("cd", student, batch=64)
    given = teaching(settings)
    learner = distill.make_learner(settings, given)
    x, t = torch.randn(64, *SHAPE), torch.rand(64, dtype=DOUBLE) * 0.8 + 0.1
    label = torch.arange(64) % 3

    def gap() -> float:
        return (given.student(x, t, label).x0 - given.teacher(x, t, label).x0).square().mean().item()

    before = gap()
    for step in range(160):
        learner.update(step)
    assert gap() < 0.25 * before


class Counting:
    """A learner that adds its number to the weight of a student."""

    def __init__(self, student: nn.Module, by: float) -> None:
        self.optimization = METHODS["cd"](ema="Constant(decay=0)").optimization(student)
        self.by, self.begun = by, student.weight.item()

    def update(self, batch: int) -> dict[str, float]:
        with torch.no_grad():
            self.optimization.module.weight += self.by
        self.optimization.ema.update()
        return {"batch": float(batch)}

    def state_dict(self) -> dict:
        return {"optimization": self.optimization.state_dict(), "begun": self.begun}

    def load_state_dict(self, state: dict) -> None:
        self.optimization.load_state_dict(state["optimization"])
        self.begun = state["begun"]


@pytest.mark.parametrize("stop", range(6))
def test_stages_follow_one_another_and_resume_at_every_step(stop):
    def staged() -> tuple[nn.Module, Staged]:
        student = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(student.weight)
        return student, Staged([Stage(n, lambda by=by: Counting(student, by)) for n, by in ((2, 1.0), (3, 10.0))])

    steps = local_steps([2, 3], 0)
    assert steps == [0, 1, 0, 1, 2]
    _, learner = staged()
    for batch in steps[:stop]:
        learner.update(batch)
    student, other = staged()
    other.load_state_dict(learner.state_dict())
    records = [other.update(batch) for batch in local_steps([2, 3], stop)]
    assert student.weight.item() == 32.0
    assert other.learner.begun == 2.0
    assert [r["stage"] for r in records] == [0.0, 0.0, 1.0, 1.0, 1.0][stop:]


@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted_bit_for_bit(name, tmp_path):
    settings = settings_of(name)
    whole = run(settings, CARD, tmp_path / "whole")
    for stop in sorted({1, math.ceil(len(whole) / 2), len(whole) - 1}):
        folder = tmp_path / str(stop)
        records = run(settings, CARD, folder, stop) + run(settings, CARD, folder)
        assert records == whole, stop
        assert held(folder) == held(tmp_path / "whole"), stop


@pytest.mark.parametrize("name", METHODS)
def test_a_student_is_a_model_like_any_other(name, tmp_path):
    settings = settings_of(name)
    run(settings, CARD, tmp_path)
    student, card = models.load(tmp_path)
    chain = Chain(**card.chain)
    assert chain == settings.chain
    policy, times = chain.policy(student, card.names), chain.times(student)
    samples = draw(policy, times, torch.arange(12) % 3, SHAPE, 0, "test")
    assert samples.shape == (12, *SHAPE)
    assert samples.isfinite().all()


def test_matching_and_the_method_resume_across_their_border(tmp_path):
    settings = settings_of("cd", Student(kind="flow", init="match", match=3))
    whole = run(settings, CARD, tmp_path / "whole")
    assert [r["stage"] for r in whole] == [0.0] * 3 + [1.0] * 6
    for stop in (2, 3, 5):
        folder = tmp_path / str(stop)
        assert run(settings, CARD, folder, stop) + run(settings, CARD, folder) == whole
        assert held(folder) == held(tmp_path / "whole")


def test_a_run_does_not_go_on_with_a_teacher_that_was_exchanged(tmp_path):
    folder, place = tmp_path / "it", tmp_path / "teacher"
    folder.mkdir()
    models.save(place, scrambled(CARD), CARD)
    settings = replace(settings_of("cd"), teacher=str(place))

    def fit() -> None:
        with Signals() as signals:
            distill.fit(settings, teaching(settings, folder=folder), folder, signals, Progress())

    fit()
    fit()
    models.save(place, scrambled(CARD, seed=2), CARD)
    with pytest.raises(ConfigError, match=r"other content of teacher .*--change teacher="):
        fit()


DISTILL = ("--evaluation.samples", 60, "--method.steps", 30, "--method.batch", 16, "--checkpoint_every", 10)


@pytest.fixture(scope="module")
def student(tiny_root):
    """The folder of a distilled run."""
    arguments = ("--root", tiny_root, "--teacher", tiny_root / "first", "--method", "cd", "--name", "student")
    result = rlfusion(tiny_root.parent, "distill", *arguments, *DISTILL, "--chain.steps", 2)
    assert result.code == 0, result.err
    return tiny_root / "student"


def test_the_command_leaves_a_model_a_picture_and_figures(student):
    figures = json.loads((student / "evaluation.json").read_text())
    assert 0 <= figures["agreement"] <= 1
    assert (student / "samples" / "grid.png").is_file()
    _, card = models.load(student)
    assert (card.chain["steps"], card.chain["kernel"], card.boundary) == (2, "Renoise()", "LCM()")
    again = rlfusion(student.parent.parent, "distill", "--resume", student)
    assert again.code == 0, again.err


def test_the_chain_of_the_base_is_that_of_its_fine_tuning(student, tiny_root):
    own = [a for i, a in enumerate(TINY) if "--chain.steps" not in (a, TINY[i - 1])]
    result = rlfusion(tiny_root.parent, "finetune", "--root", tiny_root, "--base", student, "--name", "tuned", *own)
    assert result.code == 0, result.err
    assert Chain(**models.load_card(tiny_root / "tuned").chain) == Chain(steps=2, kernel="Renoise()")
    assert models.load_card(tiny_root / "tuned").boundary == "LCM()"
    assert "samples of few steps may blur" not in result.err, "ddpo trains it as what it is"
    words = ("--agent", "nft", "--updates", 1, "--name", "blurred")
    shorter = [a for i, a in enumerate(own) if {"--updates", "--agent"}.isdisjoint((a, own[i - 1]))]
    blurred = rlfusion(tiny_root.parent, "finetune", "--root", tiny_root, "--base", student, *words, *shorter)
    assert blurred.code == 0, blurred.err
    assert "and nft trains it as a denoiser, towards means: samples of few steps may blur" in blurred.err
    one = rlfusion(tiny_root.parent, "finetune", "--base", student, *own, "--chain.steps", 1)
    assert one.code == 2
    assert "last_noise" in one.err


@pytest.mark.parametrize(
    ("agent", "steps", "more"),
    [
        ("ddpo", 1, ("--chain.last_noise", 0.1)),
        ("grpo", 1, ("--chain.last_noise", 0.1)),
        ("grpo", 4, ()),
        ("refl", 1, ()),
        ("draft", 1, ()),
        ("draft", 4, ()),
    ],
)
def test_students_of_one_to_four_steps_are_fine_tuned(student, tiny_root, agent, steps, more):
    own = ("--updates", 2, "--evaluation.samples", 60, "--rollout.prompts", 4, "--rollout.samples_per_prompt", 6)
    name = f"{agent}-{steps}"
    place = ("--root", tiny_root, "--base", student, "--name", name, "--reward", "ink", "--monitor.every", 0)
    chain = ("--chain.steps", steps, *more)
    result = rlfusion(tiny_root.parent, "finetune", *place, "--agent", agent, *chain, *own)
    assert result.code == 0, result.err
    (before, _), (after, _) = models.load(student), models.load(tiny_root / name)
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert models.load_card(tiny_root / name).chain["kernel"] == "Renoise()"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "cdd"), "unknown method 'cdd': expected one of .*did you mean 'cd'"),
        (("--method.intervalls", 3), "did you mean 'method.intervals'"),
        (("--student.kind", "flow"), "student.init = teacher: student.kind = 'flow'.*expected match"),
        (("--teacher", "nowhere"), "'nowhere' is no model"),
        (("--chain.guidance", 2), "chain.guidance = 2.0 with method.label_dropout = 0.0"),
        (("--method", "lcm", "--pretrain.train.label_dropout", 0), "guidance = 2.0 with train.label_dropout"),
        (("--method", "lcm", "--method.skip", 300), "skip = 300: expected a divisor of the 1000 times"),
        (("--method", "lcm", "--guidance", 2), "lcm draws the guidance weight itself"),
        (("--method", "pd", "--method.start", 12), "start = 12, chain.steps = 4: expected start = 2, 4, 8"),
        (("--method", "scd", "--student.kind", "v"), "TrigFlow"),
        (("--student.schedule", "DDPM()", "--student.init", "match", "--chain.steps", 2000), "at most the schedule's"),
    ],
)
def test_the_command_refuses_before_work(arguments, said):
    with pytest.raises(ConfigError) as refused:
        distill.check(command_line.settings_of("distill", [str(a) for a in arguments]))
    assert re.search(said, str(refused.value)), refused.value


def test_the_same_settings_come_back_from_the_configuration(student):
    settings = command_line.settings_of("distill", ["--config", str(student / "config.yaml"), "--seed", "1"])
    assert (settings.method.steps, settings.chain.steps, settings.seed) == (30, 2, 1)
    assert isinstance(settings, config.Distill)
    assert settings.method == small("cd", steps=30, batch=16, intervals=20, mu=0.95)


def test_consistency_distillation_in_the_perceptual_metric(tmp_path):
    """A student from random weights comes nearer, in that distance, to where the teacher's ODE ends."""
    file, _ = random_backbone(tmp_path)
    metric = LPIPS(net=NET, weights=str(file), size=64)
    text = f"LPIPS(net={NET!r}, weights={str(file)!r}, size=64)"
    settings = settings_of("cd", Student(init="random"), metric=text, steps=30, lr=1e-2, warmup=5, mu=0.0)
    settings.method.check(teaching(settings))
    records = run(settings, CARD, tmp_path)
    assert all(0 < record["loss"] < 1 and record["grad_norm"] > 0 for record in records)
    teacher, student = scrambled(CARD), models.load(tmp_path)[0]
    x, label = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3
    times = [torch.full((40,), t, dtype=DOUBLE) for t in torch.linspace(1, 0, 21).tolist()]
    goal, end = along(teacher, x, times, label), times[0]
    with torch.no_grad():
        before = metric(models.build(settings.method.card(CARD), 0)(x, end, label).x0, goal).mean()
        after = metric(student(x, end, label).x0, goal).mean()
    assert after < 0.8 * before
