"""What our rollout and our update cost beyond the bare network passes that they need.

    (1)  rollout / floor:  ``run_item`` (noise, K transitions with their log-probabilities, the environment, the reward)
         over K forward passes of the network at the same batch
    (2)  update / floor:   ``Learner.update`` (advantages, loss, clipping, AdamW, average of the weights) over the
         forward and backward passes of its transitions in the same micro-batches; "update+KL" has the KL to the
         reference model in its loss, and one forward pass of the reference more in its floor

Ours and the floor are timed alternately in one process, after a warm-up; a ratio is that of one such pair, and the
table gives the median and the quartiles over rounds. Weights are random: a fresh net's zeros would be too easy. On a
busy machine, --cpu-time counts the processor time of this process instead of the clock on the wall (CPU only).

    python benchmarks/overhead.py [--device cuda] [--threads 1] [--rounds 15] [--case unet] [--json NAME]
"""

import argparse
import cProfile
import json
import pstats
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timing import compare, machine
from torch import Tensor, nn

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet
from rlfusion.rewards import ink
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.task import Task, run_item

RESULTS = Path(__file__).parent / "results"
CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A network, and the batch that is walked and learned from."""

    net: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    steps: int
    micro_batch: int


CASES = {
    "unet": Case(lambda: UNet((3, 32, 32), CLASSES), (3, 32, 32), batch=8, steps=5, micro_batch=8),
    "unet-small": Case(lambda: UNet((3, 16, 16), CLASSES), (3, 16, 16), batch=8, steps=5, micro_batch=16),
    "digits": Case(lambda: ResidualMLP((1, 8, 8), CLASSES), (1, 8, 8), batch=128, steps=20, micro_batch=2048),
}
QUICK = ("unet-small", "digits")


class Bench:
    """The measured functions of one case, and their floors."""

    def __init__(self, case: Case, device: str, clock: Callable[[], float]) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.clock = case, device, clock
        self.net = case.net()
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.net.to(device)
        policy = Policy(Denoiser(self.net, Cosine(), "v"), DDIM(1.0))
        grid = TimeGrid(case.steps)
        self.task = Task(policy, grid, case.shape, torch.arange(CLASSES), to_pixels, ink, "ink", device)
        self.item = WorkItem(0, 0, 0, 0, tuple(i % CLASSES for i in range(case.batch)), 0)
        times, settings = grid.times(policy.schedule), {"epochs": 1, "updates_per_epoch": 1, "lr": 1e-5}
        self.learner, self.kl_learner = (
            Learner(policy, times, Config(kl_loss=kl, micro_batch=case.micro_batch, **settings)) for kl in (0.0, 0.2)
        )
        self.batch = self.rollout()
        self.rows = [self._rows(case.batch)] * case.steps
        transitions = case.batch * len(self.learner.transitions.steps)
        sizes = [min(case.micro_batch, transitions - i) for i in range(0, transitions, case.micro_batch)]
        self.parts = [self._rows(n) for n in sizes]

    def _rows(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        x, t = torch.randn(n, *self.case.shape), torch.rand(n)
        return tuple(v.to(self.device) for v in (x, t, torch.arange(n) % CLASSES))

    def rollout(self):
        return run_item(self.task, self.item)

    @torch.no_grad()
    def rollout_floor(self) -> None:
        for rows in self.rows:
            self.net(*rows)

    def update(self) -> None:
        self._update(self.learner)

    def update_floor(self) -> None:
        for rows in self.parts:
            self.net(*rows).square().sum().backward()
        self.net.zero_grad()

    def update_kl(self) -> None:
        self._update(self.kl_learner)

    def _update(self, learner: Learner) -> None:
        """With walks of the present weights: older ones would take a pass more, for their importance weights."""
        learner.update(replace(self.batch, version=learner.iteration))

    def update_kl_floor(self) -> None:
        with torch.no_grad():
            for rows in self.parts:
                self.net(*rows)
        self.update_floor()

    def compare(self, ours: Callable[[], object], floor: Callable[[], object], rounds: int) -> dict[str, float]:
        return compare(ours, floor, rounds, self.device, self.clock)


def measure(name: str, bench: Bench, rounds: int, profile: bool) -> dict:
    """The record of one case."""
    case = bench.case
    parameters = sum(p.numel() for p in bench.net.parameters())
    record = {"case": name, "parameters": parameters, "batch": case.batch, "steps": case.steps}
    for what, ours, floor in (
        ("rollout", bench.rollout, bench.rollout_floor),
        ("update", bench.update, bench.update_floor),
        ("update+KL", bench.update_kl, bench.update_kl_floor),
    ):
        record[what] = bench.compare(ours, floor, rounds)
        if profile:
            show_profile(f"{name}: {what}", ours)
    return record


def show_profile(title: str, function: Callable[[], object]) -> None:
    """Where the time of one call goes."""
    print(f"--- {title}")
    with cProfile.Profile() as profiler:
        function()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


TITLES = f"{'network':12}{'parameters':>12}{'batch':>7}{'steps':>7}   {'':10}{'floor ms':>10}{'ratio':>8}   quartiles"


def show(record: dict) -> None:
    """Print a case's rows of the table."""
    for what in ("rollout", "update", "update+KL"):
        m = record[what]
        head = f"{record['case']:12}{record['parameters']:12,}{record['batch']:7}{record['steps']:7}"
        print(f"{head}   {what:10}{m['floor_ms']:10.1f}{m['ratio']:8.3f}   {m['q1']:.3f} .. {m['q3']:.3f}", flush=True)


def main() -> None:
    """Read the arguments, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"5 rounds of {', '.join(QUICK)}")
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for a busy machine")
    parser.add_argument("--profile", action="store_true", help="print where the time of one call goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = args.case or (QUICK if args.quick else sorted(CASES))
    rounds = 5 if args.quick else args.rounds
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(TITLES, flush=True)
    records = []
    for name in names:
        records.append(measure(name, Bench(CASES[name], args.device, clock), rounds, args.profile))
        show(records[-1])
    if args.json:
        held = {"machine": machine(args.device), "rounds": rounds, "cpu_time": args.cpu_time, "records": records}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
