"""What DRaFT's gradient through the last K steps of a walk costs, with activations kept and made again.

    (1)  time:  ``Ends`` (K steps, decoding, the reward) and its backward pass over the floor, K forward and backward
         passes of the bare network at the same batch (one after the other: no graph of more than one)
    (2)  memory:  bytes of tensors that the forward pass keeps for the backward pass, each storage once, weights left
         out; and the most that both passes hold at once, gradients of the weights and scratch space included

Weights are random: a fresh net's zeros would be too easy. Ours and the floor are timed alternately, as in overhead.py.

    python benchmarks/draft.py [--device cuda] [--rounds 7] [--case unet-small] [--json NAME] [--cpu-time]
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from timing import compare, machine
from torch import Tensor, nn

from rlfusion.agents.draft import Config, Ends
from rlfusion.data import to_pixels
from rlfusion.diffusion.denoiser import Denoiser
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
TRAINED = (1, 5, 50)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "digits": (lambda: ResidualMLP((1, 8, 8), CLASSES), (1, 8, 8), 64),
    "unet-small": (lambda: UNet((3, 16, 16), CLASSES), (3, 16, 16), 2),
}


class Bench:
    """K trained steps of one network, recomputed or not, and the floor."""

    def __init__(self, case: str, trained: int, recompute: bool, device: str) -> None:
        torch.manual_seed(0)
        make, shape, batch = CASES[case]
        self.net, self.trained, self.device = make(), trained, device
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, std=0.02)
        policy = Policy(Denoiser(self.net.to(device), Cosine(), "v"), DDIM(1.0))
        task = Task(policy, TimeGrid(STEPS), shape, torch.arange(CLASSES), to_pixels, ink, "ink", device)
        self.ends = Ends(task, Config(steps=trained, recompute=recompute), 0)
        x, cond = torch.randn(batch, *shape).to(device), torch.arange(batch).to(device) % CLASSES
        self.part = Part(torch.arange(batch), x, torch.full((batch,), STEPS - trained), cond, 0, 0)

    def ours(self) -> None:
        self.ends(self.part).loss.sum().backward()
        self.net.zero_grad()

    def floor(self) -> None:
        for _ in range(self.trained):
            self.net(
                self.part.x, torch.full((len(self.part.x),), 0.5, device=self.device), self.part.cond
            ).sum().backward()
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


def measure(case: str, trained: int, recompute: bool, args: argparse.Namespace) -> dict:
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
        for trained in TRAINED:
            for recompute in (False, True) if trained > 1 else (False,):
                r = measure(case, trained, recompute, args)
                records.append(r)
                how = "made again" if recompute else "kept"
                sizes = f"{r['kept_bytes'] / 1e6:9.2f}{r['peak_bytes'] / 1e6:9.2f}"
                print(f"{case:12}{trained:4} {how:12}{sizes}{r['floor_ms']:10.1f}{r['ratio']:8.2f}", flush=True)
    if args.json:
        held = {"machine": machine(args.device), "rounds": args.rounds, "cpu_time": args.cpu_time, "records": records}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
