"""What tests of distillation share: a tiny teacher on random images, and a method's whole run in this process."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from rlfusion import config, models
from rlfusion.data import Dataset
from rlfusion.diffusion.chain import Chain
from rlfusion.distill import METHODS, Method, Student, Teaching
from rlfusion.distill.pairs import Making
from rlfusion.jobs import distill
from rlfusion.training import checkpoint

SHAPE, CLASSES = (1, 4, 4), ("a", "b", "c")
CARD = models.Card(models.Config("ResidualMLP(width=16, depth=1)", "Cosine()", "v"), SHAPE, CLASSES)
CPU = torch.device("cpu")

FEW = Making(count=12, shard=5, steps=3)

SMALL: dict[str, dict] = {
    "cd": {"intervals": 8, "mu": 0.5},
    "ct": {"s0": 2, "s1": 8, "mu0": 0.9},
    "pd": {"steps": 3, "start": 8},
    "guided_pd": {"steps": 2, "start": 8, "first": 3},
    "dmd": {"regression": 0.5, "r1": 0.1, "pairs": FEW, "fake_updates": 2},
    "reflow": {"rounds": 2, "pairs": FEW},
    "regression": {"pairs": FEW},
}
"""Settings with which a run of a method is a matter of a second, beside 6 steps of 8 samples."""

CHAINS: dict[str, Chain] = {name: replace(METHODS[name].CHAIN, steps=2) for name in ("pd", "guided_pd", "dmd", "add")}
"""The chain of such a run, where it is not the method's own."""

STUDENTS: dict[str, Student] = {
    "scd": Student(kind="TrigFlow()", schedule="Trig()", init="match", match=2, net="ResidualMLP(width=16, depth=1)")
}
"""The student of such a run, where it is not as its teacher."""


def images(n: int = 40) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    return Dataset(torch.rand(n, *SHAPE, generator=draw) * 2 - 1, torch.arange(n) % len(CLASSES), CLASSES)


def scrambled(card: models.Card, seed: int = 1):
    """A model whose every weight matters."""
    denoiser = models.build(card)
    draw = torch.Generator().manual_seed(seed)
    for p in denoiser.parameters():
        p.data.normal_(std=0.2, generator=draw)
    return denoiser


def small(name: str, **settings) -> Method:
    return METHODS[name](**{"steps": 6, "batch": 8, **SMALL.get(name, {}), **settings})


def settings_of(name: str, student: Student | None = None, **settings) -> config.Distill:
    chain = CHAINS.get(name, METHODS[name].CHAIN)
    return config.Distill(method=small(name, **settings), chain=chain, student=student or STUDENTS.get(name, Student()))


def teaching(
    settings: config.Distill, card: models.Card = CARD, folder: Path = Path(), split: bool = False
) -> Teaching:
    return distill.teach(settings, scrambled(card), card, images(), folder, CPU, split)


def run(
    settings: config.Distill, card: models.Card, folder: Path, stop: int | None = None, split: bool = False
) -> list[dict[str, float]]:
    """Go on with what ``folder`` holds, to the end or to ``stop`` updates; the metrics of each update made."""
    given = teaching(settings, card, folder, split)
    learner, stages = distill.make_learner(settings, given), distill.plan(settings, given)
    found = checkpoint.latest(folder / "checkpoints")
    start = found.step if found else 0
    if found:
        learner.load_state_dict(checkpoint.load(found.path))
    end = stages.total if stop is None else stop
    batches = distill.batches(settings, given, start)
    records = [learner.update(batch) for _, batch in zip(range(start, end), batches)]
    checkpoint.save(folder / "checkpoints", end, learner.state_dict())
    with learner.optimization.ema.averaged():
        models.save(folder / "model", given.student, replace(given.card, chain=asdict(settings.chain)))
    return records


def held(folder: Path) -> bytes:
    """All that a run leaves: its state and its student."""
    last = checkpoint.latest(folder / "checkpoints").path
    files = [*sorted(last.glob("*.safetensors")), last / "state.json", folder / "model" / "weights.safetensors"]
    return b"".join(file.read_bytes() for file in files)
