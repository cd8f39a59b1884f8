"""The trial of ``rlfusion doctor``: one rollout and one update of a fine-tuning, a row for each question.

    memory      its estimate, against what is free on the device
    disk        a file is written in the root of the runs and read back
    reward      of a rollout: finite numbers, which differ
    ratio       the learner's own check before training, such as the log-ratios of its first walks at the acting weights
    seeds       the first walks again: the same bits
    gradient    of an update: finite, not 0; how many of the trained tensors it has moved
    checkpoint  the learner's state from before the update, saved, read back and taken up again: the same bits
    ray         the first walks by a Ray worker: the same bits as here (where ``rollout.workers`` asks for some)
    time        of all updates, from these; without what comes before and beside them

A row that fails says what to change; rows that need it are then not tried.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
from torch import Tensor

from rlfusion.common.errors import NumericalError, RlfusionError, UserCodeError
from rlfusion.common.nested import flatten
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.jobs import memory
from rlfusion.jobs.check_reward import Finding, Verdict
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.finetune.job import Found, find, make_learner
from rlfusion.jobs.parts import Parts, opened
from rlfusion.jobs.preflight import try_out
from rlfusion.jobs.tasks import actors_of, cluster_of, make_task, recipe
from rlfusion.rewards import RewardError
from rlfusion.rl.agent import AgentLearner
from rlfusion.rollout import Keep, Local, make_backend
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training import checkpoint, publishing
from rlfusion.training.devices import pick_device, set_numerics

T = TypeVar("T")
PROBE = bytes(range(256)) * 4096
"""What is written to the disk: a megabyte."""
TIGHT = 0.8
"""A share of what is free beyond which memory is called tight."""


@dataclass
class Trial:
    """A fine-tuning that has begun, and what its rows have found so far. ``folder`` is for files of its own."""

    config: Finetune
    parts: Parts
    found: Found
    policy: Policy
    learner: AgentLearner
    collector: Collector
    folder: Path
    actors: Mapping[str, Sequence[str]]
    batch: Trajectory | None = None
    saved: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Finetune, folder: Path, actors: Mapping[str, Sequence[str]]) -> "Trial":
        """One with the base model, the reward and the learner of these settings; ``actors`` are those of rewards.

        Raises:
            ConfigError: settings that cannot work.
        """
        device, parts = pick_device(config.device), opened(config)
        set_numerics(config.threads, device, config.deterministic, config.tf32)
        found = find(config, parts, Signals(), Progress(), actors)
        denoiser, card, _, data, *_ = found.origin
        policy = config.chain.policy(denoiser, card.names)
        learner = make_learner(config, parts, card, policy, found.reward, data)
        acting = Local(make_task(parts.task, card, frozen_copy(policy), found.reward))
        here = replace(parts.collecting, rollout=replace(config.rollout, workers=0, lag=0))
        collector = Collector(acting, here, parts.rewards, card.classes, 0, device)
        return cls(config, parts, found, policy, learner, collector, folder, actors)

    def timed(self, what: str, act: Callable[[], T]) -> T:
        """What ``act`` gives; the seconds that it took are kept."""
        began, result = time.perf_counter(), act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[what] = time.perf_counter() - began
        return result

    def parameters(self) -> list[Tensor]:
        """What the optimiser trains."""
        return list(self.learner.optimization.named.values())


def trial(config: Finetune, estimate: memory.Estimate) -> Iterator[Finding]:
    """The rows, one by one.

    Raises:
        ConfigError: settings that cannot work.
        UserCodeError: code of the user's own raised.
    """
    room = _memory(sum(estimate.values()), pick_device(config.device))
    yield room
    if room.verdict == "FAILS":
        return
    place = _place(Path(config.root))
    try:
        folder = TemporaryDirectory(prefix=".doctor-", dir=place)
    except OSError as error:
        yield Finding("disk", "FAILS", f"{place}: {error.strerror}: expected a root that can be written")
        return
    with folder as held:
        disk = _disk(Path(held))
        yield disk
        if disk.verdict == "FAILS":
            return
        if config.learner.split:
            yield Finding("update", "note", "not tried: the network is split over ranks, and this is one process")
            return
        parts = opened(config)
        with cluster_of(config, lambda _: None), actors_of(parts.workers, parts.rewards.given) as actors:
            yield from _tried(Trial.of(config, Path(held), actors))


def _tried(held: Trial) -> Iterator[Finding]:
    for name, row in ROWS.items():
        try:
            finding = row(held)
        except UserCodeError:
            raise
        except (RlfusionError, RuntimeError, OSError) as error:
            finding = Finding(name, "FAILS", f"{type(error).__name__}: {' '.join(str(error).split())}")
        yield finding
        if finding.verdict == "FAILS":
            return


def _memory(wanted: int, device: torch.device) -> Finding:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _available()
    verdict: Verdict = "FAILS" if wanted > free else "note" if wanted > TIGHT * free else "ok"
    remedy = {
        "ok": "",
        "note": ": tight, as scratch space comes on top",
        "FAILS": ": expected a smaller agent.micro_batch, --lora, or a larger device",
    }
    return Finding("memory", verdict, f"about {wanted / 1e9:.3g} of {free / 1e9:.3g} GB free{remedy[verdict]}")


def _available() -> int:
    """Bytes of main memory that a new process may have."""
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.is_file() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _place(root: Path) -> Path:
    """The root, or the folder that is there in which it will be made."""
    return next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())


def _disk(folder: Path) -> Finding:
    file = folder / "probe"
    try:
        file.write_bytes(PROBE)
        same = file.read_bytes() == PROBE
    except OSError as error:
        return Finding("disk", "FAILS", f"{folder.parent}: {error.strerror}: expected a root that can be written")
    told = f"{folder.parent} is written and read; {disk_usage(folder).free / 1e9:.3g} GB free"
    return Finding("disk", "ok", told) if same else Finding("disk", "FAILS", f"{folder.parent} alters what it holds")


def failing(error: NumericalError) -> Finding:
    """The row of a reward that gives no numbers to learn from."""
    return Finding("reward", "FAILS", f"{error}: rlfusion check-reward tells more of it")


def _reward(held: Trial) -> Finding:
    held.collector.publish(held.collector.acting(held.learner.policy, 0))
    try:
        batch = held.batch = held.timed("rollout", lambda: held.collector.batch(0))
    except RewardError as error:
        return failing(error)
    if batch.reward is None:
        return Finding("reward", "ok", f"{len(batch)} walks; the agent asks for rewards as it learns")
    told = f"of {len(batch)} walks {batch.reward.mean():.4g} +- {batch.reward.std(correction=0):.3g}"
    if batch.reward.std(correction=0) == 0:
        return Finding("reward", "note", f"{told}: while all are equal there is nothing to learn from")
    return Finding("reward", "ok", told)


def _ratio(held: Trial) -> Finding:
    weights = held.collector.acting(held.learner.policy, 0)
    told = try_out(held.parts.task, held.learner, held.collector, weights)
    warned = any(line.startswith("warning") for line in told)
    return Finding("ratio", "note" if warned else "ok", "; ".join(line.partition(": ")[2] for line in told))


def _first(held: Trial) -> Tensor:
    """The first walks of the rollout, by this process."""
    weights = held.collector.acting(held.learner.policy, 0)
    return held.collector.backend.collect(held.collector.items(0, 0)[:1], weights)[0].x


def _seeds(held: Trial) -> Finding:
    one, two = _first(held), _first(held)
    if torch.equal(one, two):
        return Finding("seeds", "ok", f"{len(one)} walks again have the same bits")
    return Finding("seeds", "FAILS", f"{_apart(one, two)}: expected a network that draws no numbers of its own")


def _apart(one: Tensor, two: Tensor) -> str:
    return f"the same walks differ by up to {(one - two).abs().max():.3g}"


def _gradient(held: Trial) -> Finding:
    held.saved = checkpoint.save(held.folder, 0, {"learner": held.learner.state_dict()})
    before = [p.detach().clone() for p in held.parameters()]
    try:
        metrics = held.timed("update", lambda: held.learner.update(held.batch))
    except NumericalError as error:
        exact = "" if held.config.precision == "float32" else ", or precision = float32"
        return Finding("gradient", "FAILS", f"{error}: expected a smaller agent.lr{exact}")
    moved = sum(not torch.equal(p, old) for p, old in zip(held.parameters(), before))
    told = f"norm {metrics['grad_norm']:.3g}; {moved} of {len(before)} trained tensors moved"
    if not moved or not metrics["grad_norm"] > 0:
        told += ": expected rewards that differ within a prompt, and an agent.lr that moves the weights"
        return Finding("gradient", "FAILS", told)
    return Finding("gradient", "ok" if moved == len(before) else "note", told)


def _checkpoint(held: Trial) -> Finding:
    back = checkpoint.load(held.saved)["learner"]
    held.learner.load_state_dict(back)
    if wrong := _differing(back, held.learner.state_dict()):
        return Finding("checkpoint", "FAILS", f"the learner takes up another {wrong}: see state_dict in docs/doors.md")
    size = sum(file.stat().st_size for file in held.saved.rglob("*") if file.is_file())
    free, most = disk_usage(held.folder).free, held.config.checkpoints.last + 1
    told = f"of {size / 1e6:.3g} MB is taken up again with the same bits; {most} may be there at once"
    if most * size > free:
        told += f", and {free / 1e9:.3g} GB are free: expected more room, or a smaller checkpoints.last"
        return Finding("checkpoint", "FAILS", told)
    return Finding("checkpoint", "ok", told)


def _differing(one: dict, two: dict) -> str:
    """The first entry in which two states differ; "" for none."""
    for name in {**one, **two}:
        held: list[dict[str, Tensor]] = [{}, {}]
        records = [flatten(state.get(name), name, tensors) for state, tensors in zip((one, two), held)]
        same = records[0] == records[1] and all(torch.equal(t.cpu(), held[1][at].cpu()) for at, t in held[0].items())
        if not same:
            return name
    return ""


def _ray(held: Trial) -> Finding:
    config, parts, found = held.config, held.parts, held.found
    if not config.rollout.workers:
        return Finding("ray", "ok", "not asked for: rollouts are walked in this process")
    here, card = _first(held).cpu(), found.origin.card
    device, keep = pick_device(config.device), Keep(held.folder / "failed-items", "doctor", card.names)
    described = recipe(parts.task, parts.workers, card, held.policy, found.reward, device, held.actors)
    weights = publishing.acting(held.learner.policy, 0, True, config.rollout.lag, held.folder)
    with make_backend(described, parts.workers.backend, keep) as backend:
        there = backend.collect(held.collector.items(0, 0)[:1], weights)[0].x.cpu()
    if torch.equal(here, there):
        return Finding("ray", "ok", f"{len(here)} walks by a worker have the same bits as here")
    return Finding("ray", "note", f"{_apart(here, there)} between a worker and here: other hardware, or libraries?")


def _time(held: Trial) -> Finding:
    rollout, update, updates = held.seconds["rollout"], held.seconds["update"], held.config.updates
    told = f"about {_spoken((rollout + update) * updates)} for {updates} updates: {rollout:.2g} s a rollout"
    told += " (by one process), " if held.config.rollout.workers else ", "
    return Finding("time", "ok", f"{told}{update:.2g} s its update; evaluations and the monitor come on top")


def _spoken(seconds: float) -> str:
    """A time in its own unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


ROWS: dict[str, Callable[[Trial], Finding]] = {
    "reward": _reward,
    "ratio": _ratio,
    "seeds": _seeds,
    "gradient": _gradient,
    "checkpoint": _checkpoint,
    "ray": _ray,
    "time": _time,
}
