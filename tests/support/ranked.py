"""Learners on several ranks, each a process of its own: what each ends in, against one process alone."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from outsides import Beside
from processes import CONTEXT, PATIENCE
from rollout_tasks import CLASSES, SHAPE, make_policy
from torch import Tensor, nn

from rlfusion.agents import AGENTS
from rlfusion.common import shards, spec
from rlfusion.common.weights import ADAPTER
from rlfusion.data import Dataset
from rlfusion.diffusion.denoiser import Precision
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.models import lora
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item
from rlfusion.rollout.parted import Parted
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.optimization import Optimization
from rlfusion.training.ranks import Ranks, RanksDiffer, current, joined

Form = tuple[int, bool] | tuple[int, bool, bool] | tuple[int, bool, bool, str]
"""Shares, whether the sum is exact, whether the network is split, and its adapters."""
Work = tuple[list[str], Form]
STEPS, UPDATES, PER_PROMPT = 3, 2, 8


def reward(samples: Tensor, cond: object) -> Tensor:
    """Of 5 and more features, so that no two are alike."""
    return -(samples - 0.4).square().mean((1, 2, 3))


def walks(task: Task, policy: nn.Module, iteration: int) -> Trajectory:
    """A rollout under the weights that ``policy`` has; of several ranks each has the walks of its own shares."""
    acting, ranks = replace(task, policy=frozen_copy(policy)), current()
    items = plan(3, iteration, CLASSES, PER_PROMPT, 10, CLASSES, iteration)
    batch = concatenate([run_item(acting, item) for item in items])
    if ranks.count == 1:
        return batch
    split = bool(shards.roots(policy))
    LAST[:] = [Parted(batch.x[ranks.dealt(len(batch), split)[ranks.rank]], len(batch), ranks, split)]
    return replace(batch, x=LAST[0])


LAST: list[Parted] = []
"""The walks of the last rollout."""


CRITICS = ("dawr", "ppo", "qsm(c")
"""What the agents that learn a critic begin with."""
CRITIC: list[dict[str, Any]] = []
"""Of the last one: the digest of its weights, and the bytes that this rank has of them and of their moments."""


def _moments(optimization: Optimization) -> list[Tensor]:
    state = optimization.optimizer.state_dict()["state"]
    return [m for name in optimization.named for m in state.get(name, {}).values() if m.ndim]


def _of_critic(optimization: Optimization) -> dict[str, Any]:
    weights, moments = list(optimization.named.values()), _moments(optimization)
    whole = digest([shards.whole(p).detach() for p in weights])
    return {"digest": whole, "parameters": _bytes(weights), "moments": _bytes(moments)}


def held_walks() -> tuple[int, int]:
    """Bytes that this rank has of the last rollout, and of all of it."""
    x = LAST[0]
    each = x.held[:1].nbytes
    return (len(x) if x._all is not None else len(x.held)) * each, len(x) * each


def trained(
    agent: str, split: bool = False, device: str = "cpu", precision: Precision = "float32", adapters: str = ""
) -> tuple[list[Tensor], list[dict[str, float]]]:
    """The weights and metrics of a few updates of an agent, on whatever ranks this process is one of."""
    settings = spec.parse(agent, AGENTS, AGENTS.what)
    policy = make_policy(1)
    policy.denoiser.precision = precision
    lora.attach(policy.denoiser.net, adapters)
    scattered(policy)
    if split:
        shards.split(policy.denoiser.net, torch.device(device), current().exact)
    policy.to(device)
    task = Task(policy, TimeGrid(STEPS), SHAPE, torch.arange(CLASSES), lambda x: x.sigmoid(), reward, "own", device)
    task = replace(task, rollout_spec=settings.rollout_spec(STEPS), outside=Beside(make_policy(2).to(device), SHAPE))
    draw = torch.Generator().manual_seed(0)
    data = Dataset(torch.randn(48, *SHAPE, generator=draw), torch.arange(48) % CLASSES, ("a", "b", "c"))
    learner = settings.learner(task, data, 0)
    metrics = [learner.update(walks(task, learner.policy, i)) for i in range(UPDATES)]
    if agent.startswith(CRITICS):
        CRITIC[:] = [_of_critic(learner.critic.optimization)]
    return [shards.whole(p).detach().cpu() for p in policy.parameters()], metrics


def scattered(policy: nn.Module) -> None:
    """Give adapters, which begin as nothing, weights that matter."""
    draw = torch.Generator().manual_seed(2)
    for name, p in policy.named_parameters():
        if ADAPTER in name:
            p.data.normal_(std=0.2, generator=draw)


def digest(tensors: list[Tensor]) -> str:
    held = hashlib.sha256()
    for tensor in tensors:
        held.update(tensor.contiguous().numpy().tobytes())
    return held.hexdigest()


def drifted() -> str:
    """What is said where a rank's parameters are its own."""
    ranks, policy = current(), make_policy(1)
    policy.denoiser.net.leave.weight.data[0, 0] += 1e-7 * ranks.rank
    optimization = Optimization(policy, 1e-3)
    policy.denoiser.net.leave.weight.grad = torch.zeros_like(policy.denoiser.net.leave.weight)
    try:
        optimization.step()
    except RanksDiffer as error:
        return str(error)
    return ""


def held(split: bool) -> dict[str, int]:
    """Bytes that this rank holds of a network after a step: of parameters, gradients, moments and the average."""
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, CLASSES, width=64, depth=2)
    if split:
        shards.split(net, torch.device("cpu"), current().exact)
    module = nn.ModuleDict({"net": net})
    optimization = Optimization(module, 1e-3, ema=0.9)

    def body(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.ones(len(rows), *SHAPE)
        return module["net"](x, x.flatten(1)[:, 0], torch.zeros(len(rows), dtype=torch.int64)).square().sum(), {}

    current().accumulate(module, current().share(torch.arange(8), 8), 4, body)
    current().reduce(optimization.named.values())
    gradients = _bytes([p.grad for p in optimization.named.values()])
    optimization.step()
    about = {
        "parameters": list(module.parameters()),
        "moments": _moments(optimization),
        "average": optimization.ema.shadow.values(),
    }
    return {"gradients": gradients} | {name: _bytes(tensors) for name, tensors in about.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory in which they lie."""
    storages = [shards.own(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _member(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(f"{folder}/store", count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(work(rank, count, *arguments)))
    torch.distributed.destroy_process_group()


def members(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, count, *arguments)``, a function of a module, gives as JSON in each of ``count`` processes that
    are a group.
    """
    with tempfile.TemporaryDirectory() as folder:
        held = [CONTEXT.Process(target=_member, args=(rank, count, folder, work, arguments)) for rank in range(count)]
        for member in held:
            member.start()
        for member in held:
            member.join(PATIENCE)
        assert [member.exitcode for member in held] == [0] * count
        return [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(count)]


def _agents(
    rank: int, count: int, work: list[Work]
) -> tuple[list[list[tuple]], str, list[dict[str, int]], list[list[tuple[int, int]]], list[list[Any]]]:
    told, walked, critics = [], [], []
    for agents, form in work:
        with joined(Ranks(rank, count, *form[:2])):
            found = [(_told(agent, *form[2:]), held_walks(), CRITIC[:1]) for agent in agents]
        for kept, some in zip((told, walked, critics), zip(*found)):
            kept.append(list(some))
    with joined(Ranks(rank, count, count)):
        drift = drifted()
    with joined(Ranks(rank, count, count, exact=True)):
        about = [held(split) for split in ((False, True) if shards.can_split() else (False,))]
        return told, drift, about, walked, critics


def _told(agent: str, split: bool = False, adapters: str = "") -> tuple[str, list[list[float]], list[dict[str, float]]]:
    weights, metrics = trained(agent, split, adapters=adapters)
    return digest(weights), [w.flatten().tolist() for w in weights], metrics


class OfRanks(NamedTuple):
    """``told[rank][work][agent]``: the digest, the weights and the metrics; what each rank says of a drift;
    ``held`` of each, of a network that is not split and of one that is; ``walked[rank][work][agent]``:
    ``held_walks``; and ``critics[rank][work][agent]``: ``CRITIC`` after it.
    """

    told: list[list[list[tuple]]]
    drift: list[str]
    held: list[list[dict[str, int]]]
    walked: list[list[list[tuple[int, int]]]]
    critics: list[list[list[list[dict[str, Any]]]]]


@cache
def alone(agent: str, form: Form) -> tuple[str, list[list[float]], list[dict[str, float]]]:
    """The same of one process, which splits nothing."""
    with joined(Ranks(0, 1, *form[:2])):
        return _told(agent, False, *form[3:])


def on_ranks(count: int, work: list[Work]) -> OfRanks:
    """Train agents on so many ranks, each list of them in one form."""
    return OfRanks(*zip(*members(count, _agents, work)))
