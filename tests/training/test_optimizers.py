"""The optimisers: torch's own steps, state by name that goes on bit for bit, and one line for what cannot be used."""

import copy
import subprocess
import sys

import distilled
import pytest
import rollout_tasks
import torch
from counted import counting
from outsides import Beside
from torch import nn

from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError, StateError, UserCodeError
from rlfusion.common.nested import flatten
from rlfusion.config import Autoencode, TrainClip
from rlfusion.data import Dataset, to_pixels
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.distill import METHODS
from rlfusion.evaluation.classifier import Config as Classifier
from rlfusion.jobs.distill import make_learner
from rlfusion.pretrain import Config as Pretrain
from rlfusion.pretrain import Learner as Pretraining
from rlfusion.rollout import Task
from rlfusion.training import checkpoint
from rlfusion.training.optimization import Optimization
from rlfusion.training.optimizers import NamedOptimizer, parse, recipe, state_bytes
from rlfusion.training.optimizers.recipe import without_compiler

OWN = '''
import torch

class Signs(torch.optim.Optimizer):
    """Sign descent, slower with each step; it counts in its group, as some published ones do."""
    def __init__(self, params, lr=1e-3, slow=1.0):
        super().__init__(params, dict(lr=lr, slow=slow, k=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["seen"] = state.get("seen", 0) + 1
                    state["moved"] = state.get("moved", torch.zeros_like(p)) + p.grad
                    p.sub_(state["moved"].sign(), alpha=group["lr"] / (1 + group["slow"] * group["k"]))

class Random(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.add_(torch.randn_like(p), alpha=0.1)

class Hidden(Signs):
    hidden = 0
    def step(self, closure=None):
        self.hidden += 1
        self.param_groups[0]["slow"] = self.hidden
        super().step()

class Holds(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["set"] = {1, 2}

class Breaks(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        raise KeyError("no such thing")

class Closure(torch.optim.SGD):
    def step(self, closure):
        closure()

class Fixed(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})

def make(params, lr):
    return torch.optim.SGD(params, lr)
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py"


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)).to(dtype)


def named(net: nn.Module, text: str, lr: float = 1e-2, weight_decay: float = 0.0) -> NamedOptimizer:
    return NamedOptimizer(parse(text), dict(net.named_parameters()), lr, weight_decay)


def descend(net: nn.Module, optimizer, steps: range, skip: tuple[int, ...] = ()) -> float:
    for i in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(i)).to(net[0].weight)
        loss = (net(x) - x).square().mean()
        loss.backward()
        if i in skip:
            net[2].bias.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def alike(a: dict, b: dict) -> bool:
    """The same structure, values and bits."""
    ours, theirs = {}, {}
    if flatten(a, "", ours) != flatten(b, "", theirs):
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


TORCHS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw(fused=True)": (torch.optim.AdamW, {"fused": True}),
    "adamw(fused=False)": (torch.optim.AdamW, {}),
    "AdamW(betas=(0.8, 0.95), eps=1e-6)": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6}),
    "sgd": (torch.optim.SGD, {}),
    "sgd(momentum=0.9, nesterov=True)": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "torch.optim:NAdam(momentum_decay=0.01)": (torch.optim.NAdam, {"momentum_decay": 0.01}),
    "torch.optim:RMSprop(alpha=0.9)": (torch.optim.RMSprop, {"alpha": 0.9}),
}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("text", TORCHS)
def test_a_step_is_torchs_own_bit_for_bit(text, weight_decay):
    ours, theirs = network(), network()
    kind, settings = TORCHS[text]
    mine = named(ours, text, 1e-2, weight_decay)
    groups = [*theirs.parameters()]
    if "dam" in text and "fused" not in text and "torch" not in text:  # rows of whole lines are fused, the others not
        groups = [{"params": groups[::2], "fused": True}, {"params": groups[1::2]}]
    reference = kind(groups, lr=1e-2, weight_decay=weight_decay, **settings)
    for i, rate in enumerate([1e-2, 3e-3, 5e-2, 1e-4]):
        mine.lr = rate
        for group in reference.param_groups:
            group["lr"] = rate
        assert mine.lr == rate
        descend(ours, mine, range(i, i + 1), skip=(0, 2))
        descend(theirs, reference, range(i, i + 1), skip=(0, 2))
    assert same(ours, theirs)
    assert not same(ours, network())


@pytest.mark.parametrize(("most", "listed"), [(recipe.LISTED, True), (recipe.LISTED - 1, False)])
def test_a_cpu_takes_small_parameters_as_lists_with_the_same_bits(most, listed, monkeypatch):
    monkeypatch.setattr(recipe, "LISTED", 3 * 50 * 7 + most - recipe.LISTED)
    torch.manual_seed(0)
    start = [torch.randn(50, 7) for _ in range(3)]
    ours, theirs = ({str(i): nn.Parameter(p.clone()) for i, p in enumerate(start)} for _ in range(2))
    optimizer = NamedOptimizer(parse("adamw"), ours, 1e-2, 0.1)
    plain = torch.optim.AdamW(theirs.values(), 1e-2, weight_decay=0.1, foreach=False)
    for _ in range(4):
        for name, p in ours.items():
            p.grad = torch.randn(50, 7) if name != "1" else None
            theirs[name].grad = None if p.grad is None else p.grad.clone()
        with counting() as ops:
            optimizer.step()
        plain.step()
        assert (ops["aten._foreach_addcdiv_"] == 1) is listed
        assert ("aten.addcdiv_" not in ops) is listed
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    kept = optimizer.state_dict()
    assert kept["groups"] == [{}, {}]  # a checkpoint does not know of it


WIDTHS = {torch.float32: 48, torch.float64: 24, torch.bfloat16: 96}
"""Of rows of three lines each."""


@pytest.mark.parametrize("dtype", WIDTHS)
def test_rows_of_whole_lines_are_fused_and_give_the_same_bits_however_they_are_cut(dtype):
    torch.manual_seed(0)
    start = torch.randn(37, WIDTHS[dtype]).to(dtype)
    gradients = [(torch.randn_like(start) * 10.0 ** torch.randint(-5, 2, start.shape)).to(dtype) for _ in range(30)]

    def stepped(pieces: list[int], threads: int = 1, text: str = "adamw") -> torch.Tensor:
        held = {str(i): nn.Parameter(p.clone()) for i, p in enumerate(start.split(pieces))}
        optimizer, before = NamedOptimizer(parse(text), held, 1e-2, 0.1), torch.get_num_threads()
        assert text != "adamw" or [len(group["params"]) for group in optimizer.inner.param_groups] == [len(pieces), 0]
        torch.set_num_threads(threads)
        for gradient in gradients:
            for p, piece in zip(held.values(), gradient.split(pieces)):
                p.grad = piece.clone()
            optimizer.step()
        torch.set_num_threads(before)
        return torch.cat([p.detach() for p in held.values()])

    whole = stepped([37])
    assert torch.equal(whole, stepped([37], 1, "adamw(fused=True)"))
    for pieces in ([10, 10, 10, 7], [1] * 37, [19, 18]):
        assert torch.equal(whole, stepped(pieces))
    assert torch.equal(whole, stepped([37], 3))


@pytest.mark.parametrize(
    ("p", "wide"),
    [
        (torch.zeros(3, 16), True),
        (torch.zeros(2, 4, 2, 2), True),
        (torch.zeros(3, 8, dtype=torch.float64), True),
        (torch.zeros(3, 16, dtype=torch.bfloat16), False),
        (torch.zeros(16), False),
        (torch.zeros(16, 3), False),
        (torch.zeros(16, 3).T, False),
        (torch.zeros(0, 16), False),
        (torch.zeros(3, 0), False),
        (torch.zeros(()), False),
        (torch.zeros(3, 8, dtype=torch.complex64), False),
        (torch.zeros(3, 16, device="meta"), False),
    ],
)
def test_which_rows_are_whole_lines(p, wide):
    assert recipe.is_wide(p) == wide


@pytest.mark.parametrize("text", ["adamw", "adamw(fused=True)"])
def test_gradients_and_moments_that_lie_otherwise_are_stepped_as_if_they_did_not(text):
    """A fused step goes through the memory of all of them side by side."""
    torch.manual_seed(0)
    plain, twin = (nn.Parameter(torch.ones(4, 16, 2, 2)) for _ in range(2))
    other = nn.Parameter(torch.ones(4, 16, 2, 2).to(memory_format=torch.channels_last))
    optimizers_ = [NamedOptimizer(parse(text), {"p": p}, 1e-2, 0.1) for p in (plain, twin, other)]
    for step in range(4):
        gradient = torch.randn(4, 16, 2, 2)
        plain.grad, other.grad = gradient.clone(), gradient.clone()
        twin.grad = gradient.to(memory_format=torch.channels_last)
        if step == 2:  # as a file holds them
            state = copy.deepcopy(optimizers_[2].state_dict())
            held = {name: v.contiguous() for name, v in state["state"]["p"].items()}
            optimizers_[2].load_state_dict({**state, "state": {"p": held}})
        for optimizer in optimizers_:
            optimizer.step()
    assert torch.equal(plain, twin)
    if text == "adamw":
        torch.testing.assert_close(plain, other)  # the last is taken as a list
    else:
        assert torch.equal(plain, other)


def test_a_state_goes_on_from_one_way_of_the_step_to_another():
    """They have one or two groups; so had states of before."""
    net, states = network(), {}
    for text in ("adamw", "adamw(fused=False)", "adamw(fused=True)"):
        optimizer = named(net, text)
        descend(net, optimizer, range(2))
        states[text] = copy.deepcopy(optimizer.state_dict())
    for text, state in states.items():
        for other in states:
            again = named(net, other)
            again.load_state_dict(state)
            assert alike(again.state_dict()["state"], state["state"]), (text, other)


def test_a_sparse_gradient_is_refused_in_the_words_of_the_optimiser():
    p = nn.Parameter(torch.ones(4, 16))
    optimizer = NamedOptimizer(parse("adamw"), {"p": p}, 1e-2)
    p.grad = torch.ones(4, 16).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


def test_the_fused_step_is_as_near_to_exact_arithmetic_as_the_plain_one():
    def error(text: str) -> float:
        rough, exact = network(), network(torch.float64)
        optimizers_ = named(rough, text), named(exact, "adamw(fused=False)")
        for i in range(40):  # gradients of one and the same kind for both, so that only the steps differ
            draw = torch.Generator().manual_seed(i)
            for p, q in zip(rough.parameters(), exact.parameters()):
                p.grad = torch.randn(p.shape, generator=draw)
                q.grad = p.grad.double()
            for optimizer in optimizers_:
                optimizer.step()
        return max((p - q).abs().max().item() for p, q in zip(rough.parameters(), exact.parameters()))

    assert error("adamw(fused=True)") <= 1.05 * error("adamw(fused=False)")


RESUMED = [
    "adamw",
    "adamw(amsgrad=True)",
    "adamw8bit",
    "sgd",
    "sgd(momentum=0.9)",
    "torch.optim:NAdam",
    "torch.optim:RAdam",
    "torch.optim:Adafactor",
    "torch.optim:Adagrad",
    "torch.optim:ASGD",
    "Signs",
]


def text_of(text: str, own: str) -> str:
    if text == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    return f"{own}:{text}" if text == "Signs" else text


@pytest.mark.parametrize("text", RESUMED)
def test_its_state_goes_on_bit_for_bit_through_a_checkpoint(text, own, tmp_path):
    text, straight, resumed = text_of(text, own), network(), network()
    a = named(straight, text)
    descend(straight, a, range(3), skip=(0, 1))
    before = copy.deepcopy(a.state_dict())
    checkpoint.save(tmp_path / "c", 3, {"optimizer": a.state_dict()})
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    b = named(resumed, text)
    b.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path / "c").path)["optimizer"])
    assert alike(b.state_dict(), before)
    for net, optimizer in ((straight, a), (resumed, b)):
        descend(net, optimizer, range(3, 6))
    assert same(straight, resumed)
    undone = network()
    undone.load_state_dict(copy.deepcopy(straight.state_dict()))
    a.load_state_dict(before)  # as a guard undoes an update
    assert alike(a.state_dict(), before)


def bent(change) -> dict:
    net = network()
    optimizer = named(net, "adamw")
    descend(net, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("state"), "the optimiser has no 'state'"),
        (lambda s: s.update(more=1), "the optimiser has 'more'"),
        (lambda s: s.update(kind="SGD"), "of the kind 'SGD', expected 'AdamW'"),
        (lambda s: s.update(groups=[]), "the optimiser has 0 groups, expected 2"),
        (lambda s: s["groups"][0].update(k=1), "groups has 'k'"),
        (lambda s: s["groups"][0].update(eps="x"), "'eps' is str, expected float"),
        (lambda s: s.update(groups=[3, {}]), "groups is int"),
        (lambda s: s["state"].update(x=s["state"].pop("0.weight")), "moments of 'x', which is not trained here"),
        (lambda s: s["state"]["0.weight"].pop("exp_avg"), "moments of '0.weight' has no 'exp_avg'"),
        (lambda s: s["state"]["0.weight"].update(step=3), "moments of '0.weight': 'step' is int, expected Tensor"),
        (lambda s: s["state"]["0.weight"].update(exp_avg=torch.zeros(3)), r"'exp_avg' is torch.float32 \(3,\)"),
        (lambda s: s["state"].update({"0.weight": 7}), "moments of '0.weight' is int"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_first_entry(change, said):
    net = network()
    optimizer = named(net, "adamw")
    descend(net, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(StateError, match=said):
        optimizer.load_state_dict(bent(change))
    assert alike(optimizer.state_dict(), before)


def test_moments_of_another_optimiser_are_refused_before_the_first_step_too():
    with pytest.raises(StateError, match="kind 'SGD', expected 'AdamW'"):
        named(network(), "adamw").load_state_dict(named(network(), "sgd").state_dict())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adam", "unknown optimizer 'adam'.*did you mean 'adamw'"),
        ("", "unknown optimizer ''"),
        ("adamw(beta=(0.9, 0.9))", "unknown setting of optimizer 'adamw' 'beta'.*did you mean 'betas'"),
        ("adamw(betas=(2, 0.9))", "optimizer 'adamw' cannot be used.*beta parameter at index 0"),
        ("adamw(eps='x')", "eps = x of optimizer 'adamw': expected float"),
        ("adamw(lr=1e-3)", "lr = 0.001 cannot be set here"),
        ("sgd(weight_decay=0.1)", "weight_decay = 0.1 cannot be set here"),
        ("sgd(maximize=True)", "maximize = True cannot be set here"),
        ("adamw(differentiable=True)", "differentiable = True cannot be set here"),
        ("sgd(nesterov=True)", "Nesterov momentum requires a momentum"),
        ("adamw(0.9)", "expected Name or Name"),
        ("torch.optim:NAdm", "did you mean 'NAdam'"),
        ("torch.optim:LBFGS", "needs a closure"),
        ("torch.optim:SparseAdam", "takes sparse gradients alone"),
        ("torch.optim:Optimizer", "has no argument 'lr'"),
        ("torch.nn:Linear", "is Linear: expected a class of torch.optim.Optimizer"),
        ("math:pi", "is float: expected a class of torch.optim.Optimizer"),
        ("no_such_package:Adam", "no module 'no_such_package'"),
        ("OWN:Sings", "did you mean 'Signs'"),
        ("OWN:Signs(slw=1)", "unknown setting.*did you mean 'slow'"),
        ("OWN:make", "is function: expected a class of torch.optim.Optimizer"),
        ("OWN:Closure", "needs a closure"),
        ("OWN:Fixed", "has no argument 'lr'"),
        ("OWN:Random", "does not go on as before"),
        ("OWN:Hidden", "does not go on as before"),
        ("OWN:Holds", "its state cannot be saved: .*set"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(text, said, own):
    with pytest.raises(ConfigError, match=said) as refused:
        parse(text.replace("OWN", own))
    assert "\n" not in str(refused.value)


def test_what_the_users_own_code_raises_is_said_to_be_theirs(own):
    with pytest.raises(UserCodeError, match=r"Breaks'.*KeyError.*own.py"):
        parse(f"{own}:Breaks")


def test_a_parameter_or_a_weight_decay_that_a_class_cannot_take_is_refused():
    with pytest.raises(ConfigError, match=r"weight_decay = 0.1: optimizer 'torch.optim:Rprop' has none, expected 0"):
        named(network(), "torch.optim:Rprop", weight_decay=0.1)
    with pytest.raises(ConfigError, match=r"optimizer 'adamw' cannot be used.*empty parameter list"):
        NamedOptimizer(parse("adamw"), {}, 0.1)


def test_eight_bits_descend_as_adamw_does_with_a_quarter_of_the_moments():
    pytest.importorskip("bitsandbytes")
    exact, short = network(), network()
    theirs, ours = named(exact, "adamw", 3e-3), named(short, "adamw8bit", 3e-3)
    start = descend(network(), named(network(), "sgd"), range(1))
    ends = descend(exact, theirs, range(60)), descend(short, ours, range(60))
    assert ends[0] < start / 2
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    state = ours.state_dict()["state"]
    assert state["0.weight"]["state1"].dtype == state["0.weight"]["state2"].dtype == torch.uint8
    assert state["0.bias"]["state1"].dtype == torch.float32


def test_without_its_library_it_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.delitem(sys.modules, "rlfusion.training.optimizers.eight_bits", raising=False)
    with pytest.raises(ConfigError, match=r"optimizer = adamw8bit needs the package bitsandbytes.*expected adamw"):
        parse("adamw8bit")


def test_the_bytes_that_it_holds():
    net = network()
    numbers = sum(p.numel() for p in net.parameters())
    assert state_bytes(parse("adamw"), list(net.parameters())) == 2 * 4 * numbers
    assert state_bytes(parse("sgd(momentum=0.9)"), list(net.parameters())) == 4 * numbers
    assert state_bytes(parse("sgd"), list(net.parameters())) == 0


SETTINGS = {
    **AGENTS,
    **METHODS,
    "pretrain": Pretrain,
    "pretrain-autoencoder": Autoencode,
    "train-clip": TrainClip,
    "classifier": Classifier,
}


@pytest.mark.parametrize("what", SETTINGS)
def test_every_trainer_refuses_a_name_and_a_warm_up_that_cannot_be(what):
    with pytest.raises(ConfigError, match="did you mean 'adamw'"):
        SETTINGS[what](optimizer="adam")
    with pytest.raises(ConfigError, match="warmup = -1") if what != "train-clip" else pytest.raises(TypeError):
        SETTINGS[what](warmup=-1)


@pytest.mark.parametrize("what", SETTINGS)
def test_a_file_is_written_down_so_that_another_folder_finds_it(what, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SETTINGS[what](optimizer="own.py:Signs(slow=2.0)").optimizer == f"{own}:Signs(slow=2.0)"


@pytest.fixture
def built(monkeypatch):
    """The class of every optimiser that is made."""
    kinds, init = [], Optimization.__init__

    def noted(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        kinds.append(self.optimizer.recipe.kind)

    monkeypatch.setattr(Optimization, "__init__", noted)
    return kinds


@pytest.mark.parametrize("name", AGENTS)
def test_every_agent_and_what_learns_beside_it_uses_its_optimizer(name, built):
    def bright(samples, cond):
        return samples.mean((1, 2, 3))

    data = Dataset(torch.zeros(6, *rollout_tasks.SHAPE), torch.arange(6) % 3, ("a", "b", "c"))
    policy = rollout_tasks.make_policy()
    about = (TimeGrid(4), rollout_tasks.SHAPE, torch.arange(3), to_pixels, bright, "bright")
    task = Task(policy, *about, outside=Beside(policy, rollout_tasks.SHAPE))
    learner = AGENTS[name](optimizer="sgd(momentum=0.5)", warmup=3).learner(task, data, 0)
    assert set(built) == {torch.optim.SGD}
    assert len(built) == 1 + (name in ("qsm", "dawr", "ppo"))  # these learn a critic, or a value, beside
    assert learner.optimization.optimizer.lr == pytest.approx(AGENTS[name]().lr / 4)


@pytest.mark.parametrize("name", METHODS)
def test_every_network_that_a_method_trains_uses_its_optimizer(name, built, tmp_path):
    settings = distilled.settings_of(name, optimizer="sgd")
    make_learner(settings, distilled.teaching(settings, folder=tmp_path))
    assert set(built) == {torch.optim.SGD}


def test_pretraining_uses_its_optimizer(built):
    settings = Pretrain(optimizer="sgd", steps=2, batch=4)
    Pretraining(distilled.scrambled(distilled.CARD), distilled.images(), settings)
    assert built == [torch.optim.SGD]


def test_a_step_imports_no_compiler():
    code = (
        "import sys, torch; from rlfusion.training.optimization import Optimization\n"
        "for text in ('adamw', 'sgd(momentum=0.9)', 'torch.optim:NAdam'):\n"
        "    net = torch.nn.Linear(2, 2); o = Optimization(net, 0.1, optimizer=text, warmup=2)\n"
        "    for i in range(3): net(torch.ones(1, 2)).sum().backward(); o.step(); o.load_state_dict(o.state_dict())\n"
        "print('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_class_of_torch_steps_the_same_without_the_compilers_wrappers():
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)]
    tried = 0
    for kind in kinds:
        try:
            parse(f"torch.optim:{kind.__name__}")
            theirs = network()
            reference = kind(theirs.parameters(), lr=1e-2)
        except (ConfigError, ValueError):  # LBFGS, SparseAdam, Optimizer itself; Muon takes no vectors
            continue
        ours = network()
        bare = without_compiler(kind)(ours.parameters(), lr=1e-2)
        descend(ours, bare, range(3))
        descend(theirs, reference, range(3))
        assert same(ours, theirs), kind
        tried += 1
    assert tried >= 11
