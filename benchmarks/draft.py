"""What DRaFT's gradient through the last K steps of a walk costs, with activations kept and made again.

    (1)  time:  ``Ends`` (K steps, decoding, the reward) and its backward pass over the floor, K forward and backward
         passes of the bare network at the same batch (one after the other: no graph of more than one); a guided network
         has two rows a sample
    (2)  memory:  bytes of tensors that the forward pass keeps for the backward pass, each storage once, weights left
         out; and the most that both passes hold at once, gradients of the weights and scratch space included

Weights are random: a fresh net's zeros would be too easy. Ours and the floor are timed alternately, as in overhead.py.

Records of the cases that are run take the place of theirs in the JSON.

    python benchmarks/draft.py [--device cuda] [--rounds 7] [--case unet-small] [--json NAME] [--cpu-time]
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from timing import compare, machine
from torch import Tensor, nn

from rlfusion.agents.draft import Config, Ends
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser, Guided
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet
from rlfusion.rewards import ink
from rlfusion.rl.reward_gradient import Part
from rlfusion.rollout import Task

RESULTS = Path(__file__).parent / "results"
CLASSES, STEPS = 10, 50


class Case(NamedTuple):
    """A network, its samples, the K, and the guidance weight, 0 for none."""

    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    batch: int
    trained: tuple[int, ...] = (1, 5, 50)
    guidance: float = 0.0


CASES = {
    "digits": Case(lambda: ResidualMLP((1, 8, 8), CLASSES), (1, 8, 8), 64),
    "unet-small": Case(lambda: UNet((3, 16, 16), CLASSES), (3, 16, 16), 2),
    "unet-guided": Case(lambda: UNet((3, 16, 16), CLASSES), (3, 16, 16), 2, (1, 5), 1.5),
}
HOW: dict[bool | str, str] = {False: "kept", True: "made again", "halves": "by halves"}


class Bench:
    """K trained steps of one network, recomputed or not, and the floor."""

    def __init__(self, case: str, trained: int, recompute: bool | Literal["halves"], device: str) -> None:
        torch.manual_seed(0)
        make, shape, batch, _, guidance = CASES[case]
        self.net, self.trained, self.device = make(), trained, device
        self.copies = 2 if guidance else 1
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.02)
        denoiser = Denoiser(self.net.to(device), Cosine(), "v")
        guided = Guided(denoiser, guidance, torch.tensor([CLASSES])) if guidance else denoiser
        policy = Policy(guided, DDIM(1.0))
        task = Task(policy, TimeGrid(STEPS), shape, torch.arange(CLASSES), to_pixels, ink, "ink", device)
        self.ends = Ends(task, Config(steps=trained, recompute=recompute), 0)
        x, cond = torch.randn(batch, *shape).to(device), torch.arange(batch).to(device) % CLASSES
        self.part = Part(torch.arange(batch), x, torch.full((batch,), STEPS - trained), cond, 0, 0)

    def ours(self) -> None:
        self.ends(self.part).loss.sum().backward()
        self.net.zero_grad()

    def floor(self) -> None:
        x, cond = torch.cat([self.part.x] * self.copies), torch.cat([self.part.cond] * self.copies)
        for _ in range(self.trained):
            self.net(x, torch.full((len(x),), 0.5, device=self.device), cond).sum().backward()
        self.net.zero_grad()

    def kept(self) -> int:
        """Bytes that the forward pass keeps, Eq. (2)."""
        weights = {p.untyped_storage().data_ptr() for p in self.net.parameters()}
        storages: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            terms = self.ends(self.part)
        assert terms.loss.requires_grad
        return sum(x.untyped_storage().nbytes() for at, x in storages.items() if at not in weights)

    def peak(self) -> int:
        """The most bytes that forward and backward hold at once, Eq. (2)."""
        if self.device.startswith("cuda"):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.ours()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.ours()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def measure(case: str, trained: int, recompute: bool | Literal["halves"], args: argparse.Namespace) -> dict:
    """The record of one row."""
    bench = Bench(case, trained, recompute, args.device)
    bench.ours()
    record = {"case": case, "trained": trained, "recompute": recompute}
    record |= {"kept_bytes": bench.kept(), "peak_bytes": bench.peak()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    return record | compare(bench.ours, bench.floor, args.rounds, args.device, clock)


def main() -> None:
    """Read the arguments, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    records = []
    print(f"{'network':12}{'K':>4} {'activations':12}{'kept MB':>9}{'peak MB':>9}{'floor ms':>10}{'ratio':>8}")
    for case in args.case or sorted(CASES):
        for trained in CASES[case].trained:
            for recompute, how in HOW.items():
                if (recompute is True and trained == 1) or (recompute == "halves" and not CASES[case].guidance):
                    continue
                r = measure(case, trained, recompute, args)
                records.append(r)
                sizes = f"{r['kept_bytes'] / 1e6:9.2f}{r['peak_bytes'] / 1e6:9.2f}"
                print(f"{case:12}{trained:4} {how:12}{sizes}{r['floor_ms']:10.1f}{r['ratio']:8.2f}", flush=True)
    if args.json:
        write(RESULTS / f"{args.json}.json", records, args)


def write(file: Path, records: list[dict], args: argparse.Namespace) -> None:
    """Write the records, each with what it was measured on, beside those of cases that were not run."""
    about = {"machine": machine(args.device), "rounds": args.rounds, "cpu_time": args.cpu_time}
    held = json.loads(file.read_text()) if file.exists() else {"records": []}
    of_all = {name: value for name, value in held.items() if name != "records"}
    cases = {r["case"] for r in records}
    others = [of_all | r for r in held["records"] if r["case"] not in cases]
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"records": others + [about | r for r in records]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
