"""Pairs of a teacher: noise, and where its probability-flow ODE takes it; made by the rollout workers, kept as shards.

    (1)  x_1 = sigma(1) z,   x_0 = the end of the walk from x_1 by DDIM(eta=0) over K steps;     the pair is (x_0, z)

Shard n of N in round r (of reflow; 0 elsewhere) holds the walks of rollout r N + n of the plan of ``rlfusion.rollout``,
so that a pair is a pure function of (seed, teacher, r, n, its number): the noise of each round is its own, any number
of workers gives the same, and what is already there is not made again.

    pairs/shard-00000.safetensors    x0 (N, *), eps (N, *), label (N,)
    pairs/pairs.json                 whose pairs they are, and the SHA-256 of each shard
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common import shards, storage, streamed
from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.seeding import Key
from rlfusion.common.stops import in_force
from rlfusion.common.tensors import Cond
from rlfusion.common.weights import Live, Weights, learned, pack, read_file, sha256, unpack
from rlfusion.data import Dataset
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser, require_readable
from rlfusion.diffusion.policy import Policy
from rlfusion.pretrain import Draw, Draws
from rlfusion.rollout import Backend, Recipe, Settings, Task, make_backend, plan, prefix, rollout_noise
from rlfusion.rollout.among_ranks import InStep
from rlfusion.rollout.local import Local
from rlfusion.rollout.trajectory import concatenate
from rlfusion.training import publishing
from rlfusion.training.checkpoint import MALFORMED, set_aside, write_json_atomic
from rlfusion.training.devices import set_numerics, told
from rlfusion.training.ranks import current

ITEM = 250
"""Walks of a work item."""


@dataclass(frozen=True)
class Making:
    """The settings of making pairs.

    Attributes:
        count: pairs in all, spread evenly over the classes.
        shard: pairs of a shard: what an interrupted job makes again at most.
        steps: K, the teacher's steps.
    """

    count: int = 8000
    shard: int = 2000
    steps: int = 50

    def __post_init__(self) -> None:
        require_positive(self, "count", "shard", "steps")

    def check(self, card: models.Card, source: nn.Module) -> None:
        """Raise ConfigError where there are fewer pairs than classes, or ``source`` cannot walk the chain."""
        if self.count < card.classes:
            raise ConfigError(f"count = {self.count}: expected a pair for each of the {card.classes} classes at least")
        require_readable(source, self.chain(0.0).times(source)[:-1])

    def chain(self, guidance: float) -> Chain:
        """The chain of Eq. (1), with the weight w of the teacher's classifier-free guidance."""
        return Chain(steps=self.steps, kernel="DDIM(eta=0.0)", guidance=guidance)


class Pairs(NamedTuple):
    """x0 (N, *), eps (N, *), label (N,) int64, on the CPU."""

    x0: Tensor
    eps: Tensor
    label: Tensor


class PairDraws:
    """Draws as of supervised training, whose noise is that of the pair. ``pairs`` is asked at the first draw."""

    def __init__(
        self,
        pairs: Callable[[], Pairs],
        classes: int,
        batch: int,
        total: int,
        device: torch.device,
        *key: Key,
        dropout: float = 0.0,
    ) -> None:
        """``total`` is the steps of the training, ``key`` = (seed, purpose); each pair loses its label with probability
        ``dropout``.
        """
        self.pairs, self.classes, self.batch, self.total = pairs, classes, batch, total
        self.device, self.key, self.dropout = device, key, dropout

    @cached_property
    def _held(self) -> tuple[Draws, Tensor]:
        pairs = self.pairs()
        data = Dataset(pairs.x0, pairs.label, tuple(str(i) for i in range(self.classes)))
        return Draws(data, self.batch, self.dropout, self.total, self.device, *self.key), pairs.eps.to(self.device)

    def __call__(self, step: int) -> Draw:
        """The draw of step number ``step``."""
        draws, eps = self._held
        draw = draws(step)
        return replace(draw, eps=eps[draw.index])


class Source(NamedTuple):
    """The model that makes pairs, its card, and the guidance weight with which it does."""

    model: Denoiser
    card: models.Card
    guidance: float


def make_pairs(
    source: Source,
    making: Making,
    folder: Path,
    seed: int,
    settings: Settings,
    say: Callable[[str], None] = print,
    stop: Callable[[], None] = lambda: None,
    round: int = 0,
) -> Pairs:
    """The pairs of ``source`` in a round, from ``folder`` as far as they are there.

    A shard that is damaged, or of another teacher, is renamed ``*.corrupt``, told, and made again. ``stop`` is called
    between the walks of a shard too, and may raise: that shard alone is then made again. Of several ranks the first
    makes them, and all others find them; or, where the source is split over them and there are no workers, all do.
    """
    card, chain, ranks = source.card, making.chain(source.guidance), current()
    policy = chain.policy(source.model, card.names)
    sizes = [min(making.shard, making.count - first) for first in range(0, making.count, making.shard)]
    walks = [_Shard(seed, round * len(sizes) + n, card.classes, size) for n, size in enumerate(sizes)]
    identity = _identity(card, chain, making, seed, _digest(policy), round)
    with ranks.in_turn():
        held = _Shards(folder, identity)
        missing = [] if ranks.rank else held.missing(len(walks), say)
    missing = json.loads(ranks.exchange(json.dumps(missing).encode())[0])
    if missing and shards.roots(policy) and not settings.workers:
        with InStep(Local(_task(policy, card, chain)), ranks) as backend:
            held.make(missing, walks, backend, Live(policy, 0), ranks.count, stop)
    elif missing:
        weights = publishing.acting(policy, 0, settings.workers > 0, 0, folder)
        with ranks.in_turn():
            if not ranks.rank:
                device = str(next(policy.parameters()).device)
                with make_backend(_recipe(card, chain, policy, device, settings), settings) as backend:
                    held.make(missing, walks, backend, weights, max(1, settings.workers), stop)
        publishing.clear(policy, settings.workers > 0, folder)
    with ranks.in_turn():
        parts = [held.read(n) for n in range(len(sizes))]
    return Pairs(*(torch.cat([part[name] for part in parts]) for name in Pairs._fields))


def _digest(policy: Policy) -> str:
    """The SHA-256 of the blob of its weights, of which no more than a tensor is whole at a time."""
    return streamed.digest({name: streamed.part(p, partial(shards.whole, p)) for name, p in learned(policy).items()})


class _Shard(NamedTuple):
    """Eq. (1) for the ``size`` pairs of one rollout, class by class in turn."""

    seed: int
    rollout: int
    classes: int
    size: int

    def walk(self, backend: Backend, weights: Weights, at_once: int, stop: Callable[[], None]) -> dict[str, Tensor]:
        """The pairs; ``stop`` is called between every ``at_once`` work items."""
        each = -(-self.size // self.classes)
        items = plan(self.seed, self.rollout, self.classes, each, ITEM, self.classes, weights.version)
        parts = list(backend.collect(items[:at_once], weights))
        for first in range(at_once, len(items), at_once):
            stop()
            parts += backend.collect(items[first : first + at_once], weights)
        walks = concatenate(parts).to("cpu")
        chosen = torch.arange(each * self.classes).reshape(self.classes, each).T.flatten()[: self.size]
        eps = rollout_noise(self.seed, self.rollout, chosen.tolist(), 0, tuple(walks.x.shape[2:]))[:, 0]
        return {"x0": walks.x[chosen, -1], "eps": eps, "label": walks.group[chosen]}


def build_task(config: dict[str, Any], blobs: Mapping[str, bytes]) -> Task:
    """The teacher's task of one worker, from plain data: the builder that rollout backends call."""
    set_numerics(config["threads"], config["device"], config["deterministic"], config["tf32"])
    card, chain = models.Card.from_json(config["card"]), Chain(**config["chain"])
    denoiser = models.build(card)
    models.load_space(denoiser, blobs.get("space"))
    return _task(chain.policy(denoiser.to(config["device"]), card.names), card, chain)


def _task(policy: Policy, card: models.Card, chain: Chain) -> Task:
    """The teacher's task, where it is."""
    return Task(
        policy=policy,
        grid=chain.grid(policy.denoiser),
        shape=policy.space.latent(card.shape),
        conditions=torch.arange(card.classes),
        decode=_as_it_is,
        reward=_nothing,
        reward_name="none",
        device=str(next(policy.parameters()).device),
        rollout_spec=prefix(chain.moves, chain.moves),
    )


def _as_it_is(x: Tensor) -> Tensor:
    """Returns its input: the samples are not scored, so nothing is decoded."""
    return x


def _nothing(samples: Tensor, cond: Cond) -> Tensor:
    """The environment asks for a reward at the end of the walk; pairs have none."""
    return samples.new_zeros(len(samples))


def _recipe(card: models.Card, chain: Chain, policy: Policy, device: str, settings: Settings) -> Recipe:
    described = {
        "card": asdict(card),
        "chain": asdict(chain),
        "threads": settings.threads,
        **dict(zip(("deterministic", "tf32"), told())),
        "device": settings.worker_device(device),
    }
    return Recipe("rlfusion.distill.pairs:build_task", described, models.space_blob(policy.space))


def _identity(card: models.Card, chain: Chain, making: Making, seed: int, weights: str, round: int) -> str:
    """16 hex digits over all that the shards depend on; ``weights`` is the SHA-256 of the teacher's."""
    about = {
        **asdict(chain),
        **asdict(making),
        "seed": seed,
        "round": round,
        "model": asdict(card.config),
        "names": card.names,
    }
    return hashlib.sha256((json.dumps(about, sort_keys=True) + weights).encode()).hexdigest()[:16]


class _Shards:
    """The files of one folder, and their manifest."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        storage.make_folder(folder)
        self.manifest = folder / "pairs.json"
        self.known: dict[str, str] = self._read_manifest()

    def _read_manifest(self) -> dict[str, str]:
        """The SHA-256 of each shard; of none where the manifest is of other pairs, or damaged, as shards may be."""
        try:
            held = json.loads(read_file(self.manifest))
            return dict(held["shards"].items()) if held["identity"] == self.identity else {}
        except FileNotFoundError:
            return {}
        except MALFORMED:
            if not self.manifest.is_file():  # a folder, a pipe: nothing is written over it
                set_aside(self.manifest, "corrupt")
            return {}

    def path(self, n: int) -> Path:
        return self.folder / f"shard-{n:05d}.safetensors"

    def sound(self, n: int, say: Callable[[str], None]) -> bool:
        """The shard is there and is what was written for this teacher; another file in its place is set aside."""
        path = self.path(n)
        if not os.path.lexists(path):
            return False
        try:
            if sha256(read_file(path)) == self.known.get(path.name):
                return True
        except OSError:  # a folder, a pipe, a link to nothing
            pass
        aside = set_aside(path, "corrupt")
        say(f"pairs {path} are damaged or another teacher's: set aside as {aside.name}, and made again")
        return False

    def missing(self, count: int, say: Callable[[str], None]) -> list[int]:
        """Which of so many shards are not ``sound``."""
        return [n for n in range(count) if not self.sound(n, say)]

    def make(
        self,
        missing: list[int],
        walks: list[_Shard],
        backend: Backend,
        weights: Weights,
        at_once: int,
        stop: Callable[[], None],
    ) -> None:
        """Walk and write the shards that are missing."""
        for n in missing:
            with in_force().prompt():  # no update is under way
                walked = walks[n].walk(backend, weights, at_once, stop)
            if storage.writes():
                self.write(n, walked)
            stop()

    def write(self, n: int, tensors: dict[str, Tensor]) -> None:
        """The shard, then the manifest that knows it; each is whole or as it was."""
        blob, path = pack(tensors), self.path(n)
        storage.write(path, blob)
        self.known[path.name] = sha256(blob)
        write_json_atomic(self.manifest, {"identity": self.identity, "shards": self.known})

    def read(self, n: int) -> dict[str, Tensor]:
        return unpack(self.path(n).read_bytes())
