"""Teachers and students of every making: what each method takes, what it refuses before work, and who learns on it."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from distilled import CARD, CHAINS, FEW, SHAPE, images, run, scrambled, settings_of, teaching
from torch.nn import functional as F

from rlfusion import models
from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError
from rlfusion.config import Base
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Embedded
from rlfusion.distill import METHODS, Student
from rlfusion.distill.pairs import Making
from rlfusion.jobs import distill
from rlfusion.jobs.pretrain import card_of, require_solvable
from rlfusion.objectives import ADVERSARIAL
from rlfusion.rl.critic import make_critic
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.trajectory import concatenate

READS = replace(CARD, weights=(0.0, 4.0))
BOUNDARY = replace(CARD, boundary="LCM()")


def of(kind: str, schedule: str):
    return replace(CARD, config=replace(CARD.config, kind=kind, schedule=schedule))


@pytest.mark.parametrize("name", ["cd", "pd", "vsd", "dmd", "add", "reflow"])
def test_a_teacher_that_reads_the_guidance_weight_teaches_at_that_of_the_run(name, tmp_path):
    settings = replace(settings_of(name, Student(init="match", match=2)), guidance=1.5)
    settings.method.check(teaching(settings, READS))
    records = run(settings, READS, tmp_path)
    assert all(value == value for record in records for value in record.values())


def test_fakes_and_discriminators_begin_as_the_teacher_at_that_weight():
    settings = replace(settings_of("vsd", Student(init="match")), guidance=1.5)
    given = teaching(settings, READS)
    x, t, label = torch.randn(4, *SHAPE), torch.full((4,), 0.5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    fake = settings.method.parts(given)["fake"].denoiser
    assert torch.equal(fake(x, t, label).x0, given.teacher(x, t, label).x0)
    assert all(p.requires_grad for p in fake.parameters())


ATTENTIVE = [
    "DiT(patch=2, width=16, depth=1, heads=2)",
    "DiT(patch=2, width=16, depth=1, heads=2, recompute=True)",
    "UNet(width=8, multipliers=(1, 2), depth=1, attention=(1,))",
]


@pytest.mark.parametrize("net", ATTENTIVE)
@pytest.mark.parametrize("name", ["add", "dmd"])
def test_the_gradient_penalty_passes_through_attention(name, net, tmp_path):
    card = replace(CARD, config=replace(CARD.config, net=net))
    records = run(settings_of(name, steps=1), card, tmp_path)
    assert all(value == value for record in records for value in record.values())


def test_the_generators_loss_has_the_gradient_of_the_discriminator_and_leaves_it_none():
    settings = settings_of("add", per_step=False)
    given = teaching(settings)
    judge = settings.method.judging(given, ADVERSARIAL["nonsaturating"], None, 0.0, 1e-3)
    torch.nn.init.normal_(judge.critic.head.weight)
    draw = settings.method.draws(given, 1, "test")(0)
    fake = draw.x0.clone().requires_grad_()
    loss = judge.generator_loss(draw, fake)
    (loss * torch.arange(8.0)).sum().backward()
    assert all(p.grad is None for p in judge.critic.parameters())
    direct = draw.x0.clone().requires_grad_()
    logits = judge.critic(direct, torch.zeros(8, dtype=torch.float64), draw.cond)
    (F.softplus(-logits) * torch.arange(8.0)).sum().backward()
    torch.testing.assert_close(loss, F.softplus(-logits))
    torch.testing.assert_close(fake.grad, direct.grad)


@pytest.mark.parametrize(("card", "by"), [(BOUNDARY, r"boundary, LCM\(\)"), (replace(CARD, answers="end"), "training")])
@pytest.mark.parametrize("name", METHODS)
def test_a_consistency_function_teaches_by_its_weights_alone(name, card, by):
    settings = replace(settings_of(name), teacher="runs/x")
    if name == "ct":
        distill.require_denoiser(settings, card)
        return
    with pytest.raises(ConfigError, match=f"teacher = 'runs/x'.*by its {by}.*{name} expected a denoiser"):
        distill.require_denoiser(settings, card)


def test_models_say_whether_they_answer_with_the_mean_or_the_end(tmp_path):
    """Of pretraining by its objective, of distillation by its method, of a folder as it was saved; else the mean."""
    for loss, answers in {"Denoising()": "mean", "CT()": "end", "ICT()": "end", "SCT()": "end"}.items():
        assert card_of(replace(Base(), train=replace(Base().train, loss=loss)), images()).answers == answers
    teach = {name: teaching(settings_of(name), replace(CARD, answers="end")).card for name in METHODS}
    assert {name for name, card in teach.items() if card.answers == "mean"} == {"pd", "guided_pd", "reflow"}
    models.save(tmp_path, scrambled(teach["cd"]), teach["cd"])
    card = models.load_card(tmp_path)
    assert card.answers == "end"
    silent = json.loads(json.dumps({k: v for k, v in asdict(card).items() if k != "answers"}))
    assert models.Card.from_json(silent).answers == "mean"


@pytest.mark.parametrize("name", ["cd", "lcm", "ct", "dmd", "reflow", "regression"])
def test_eps_at_pure_noise_is_refused_where_the_method_asks_for_it(name):
    """The student's own chain leaves it out."""
    settings = settings_of(name, **({"intervals": 8} if name == "cd" else {}))
    settings = replace(settings, chain=replace(CHAINS.get(name, METHODS[name].CHAIN), spacing="leading"))
    given = teaching(settings, of("eps", "ZeroSNR()"))
    require_solvable(given.student, settings.chain)
    with pytest.raises(ConfigError, match=r"kind = eps.*does not determine x0 and eps"):
        settings.method.check(given)


def test_a_network_that_reads_the_logarithm_of_the_noise_is_asked_at_none_and_at_all_of_it_nowhere():
    with pytest.raises(ConfigError, match="no finite time input"):
        require_solvable(scrambled(of("EDM()", "Cosine()")), Chain(steps=2))
    require_solvable(scrambled(of("EDM()", "VP()")), Chain(steps=2))
    assert teaching(settings_of("cd"), of("EDM()", "VP()")).card.boundary == "LCM()"
    clean = settings_of("add")
    with pytest.raises(ConfigError, match="expected noised = True"):
        clean.method.check(teaching(clean, of("EDM()", "VP()")))
    noised = settings_of("add", noised=True)
    noised.method.check(teaching(noised, of("EDM()", "VP()")))


def test_a_table_with_fewer_times_than_the_teachers_walk_is_refused():
    settings = settings_of("reflow", pairs=Making(count=12, steps=9))
    settings = replace(settings, chain=replace(settings.chain, steps=2))
    with pytest.raises(ConfigError, match="steps = 9: expected at most the schedule's 8 times"):
        settings.method.check(teaching(settings, of("v", "DDPM(resolution=8)")))


def test_labels_of_pairs_are_dropped_as_asked(tmp_path):
    settings = settings_of("reflow", rounds=1, batch=2000, label_dropout=0.3)
    draw = distill.make_learner(settings, teaching(settings, CARD, tmp_path)).draw(0)
    assert (draw.cond == draw.no_class).double().mean().item() == pytest.approx(0.3, abs=0.04)
    one = settings_of("regression", label_dropout=0.3)
    with pytest.raises(ConfigError, match=r"label_dropout = 0\.3.*expected 0"):
        one.method.check(teaching(one))


def test_a_map_from_pure_noise_is_sampled_from_pure_noise():
    settings = settings_of("regression")
    settings = replace(settings, chain=replace(settings.chain, spacing="leading"))
    with pytest.raises(ConfigError, match=r"chain\.spacing = leading"):
        settings.method.check(teaching(settings, of("v", "DDPM()")))


def test_damaged_manifests_and_other_counts_are_made_again(tmp_path):
    given, said = replace(teaching(settings_of("regression"), CARD, tmp_path)), []
    given = replace(given, say=said.append)
    whole = given.pairs(FEW)()
    manifest = tmp_path / "pairs" / "pairs.json"
    for damage in ("{", "[]", json.dumps({"shards": {}})):
        manifest.write_text(damage)
        again = given.pairs(FEW)()
        assert torch.equal(again.x0, whole.x0)
    assert len(said) == 9
    more = given.pairs(replace(FEW, count=15))()
    assert [len(part) for part in more] == [15, 15, 15]


def reward(samples, cond):
    return samples.flatten(1).mean(1)


def task(policy, chain: Chain, rollout_spec) -> Task:
    grid, conditions = chain.grid(policy.denoiser), torch.arange(CARD.classes)
    return Task(policy, grid, SHAPE, conditions, lambda x: (x + 1) / 2, reward, "mean", rollout_spec=rollout_spec)


AROUND = [BOUNDARY, READS, replace(READS, boundary="LCM()")]


@pytest.mark.parametrize("card", AROUND, ids=["boundary", "reads w", "both"])
@pytest.mark.parametrize(
    ("agent", "settings"),
    [("drwr", {"on": "noised", "kl": 0.1}), ("dawr", {"on": "noised"}), ("dawr", {}), ("qsm", {"critic_updates": 2})],
)
def test_students_are_policies_of_the_regressions_too(card, agent, settings):
    chain = Chain(steps=2, kernel="Renoise()", guidance=1.0 if card.weights else 0.0)
    policy = chain.policy(scrambled(card), card.names)
    config = AGENTS[agent](**settings)
    rollout_spec = config.rollout_spec(chain.moves)
    worker = task(copy.deepcopy(policy), chain, rollout_spec)
    learner = config.learner(task(policy, chain, rollout_spec), images(), 0)
    batch = concatenate([run_item(worker, item) for item in plan(0, 0, 3, 4, 12, 3, 0)])
    before = [p.clone() for p in policy.parameters()]
    metrics = learner.update(batch)
    assert all(value == value for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_a_critic_copies_a_network_that_reads_the_guidance_weight_at_that_of_the_chain():
    chain = Chain(steps=2, kernel="Renoise()", guidance=1.0)
    policy = chain.policy(scrambled(replace(READS, boundary="LCM()")), READS.names)
    critic = make_critic("Copy()", task(policy, chain, AGENTS["qsm"]().rollout_spec(2)), 0)
    x, t, label = torch.randn(3, *SHAPE), torch.tensor(0.5, dtype=torch.float64), torch.arange(3)
    within = policy.denoiser.denoiser.denoiser
    w = torch.ones(3)
    assert isinstance(critic.denoiser, Embedded)
    assert torch.equal(critic.denoiser.answer(x, t, label), within.answer(x, t, {"label": label, "w": w}))


@pytest.mark.parametrize("card", AROUND, ids=["boundary", "reads w", "both"])
@pytest.mark.parametrize("agent", ["drwr", "refl"])
def test_students_have_no_loss_of_their_own_training_on_data(card, agent):
    chain = Chain(steps=2, kernel="Renoise()", guidance=1.0 if card.weights else 0.0)
    config = AGENTS[agent](pretrain_weight=0.1)
    place = task(chain.policy(scrambled(card), card.names), chain, config.rollout_spec(2))
    with pytest.raises(ConfigError, match=r"pretrain_weight = 0\.1: the base model is a student"):
        config.learner(place, images(), 0)


def test_stages_within_the_last_are_counted_on(tmp_path):
    records = run(settings_of("pd", Student(kind="flow", init="match", match=2)), CARD, tmp_path)
    assert [r["stage"] for r in records] == [0.0] * 2 + [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize("agent", ["drwr", "dawr", "grpo"])
def test_walks_left_out_may_leave_an_update_without_any(agent):
    chain = Chain(steps=2, kernel="Renoise()")
    policy = chain.policy(scrambled(CARD), CARD.names)
    config = AGENTS[agent](updates_per_epoch=12)
    rollout_spec = config.rollout_spec(chain.moves)
    worker = task(copy.deepcopy(policy), chain, rollout_spec)
    batch = concatenate([run_item(worker, item) for item in plan(0, 0, 3, 4, 12, 3, 0)]).take(torch.arange(11))
    metrics = config.learner(task(policy, chain, rollout_spec), images(), 0).update(batch)
    assert all(value == value for value in metrics.values())
