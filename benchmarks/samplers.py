"""What each sampler costs beyond the bare network passes that it needs.

    ratio = time of drawing a batch / time of as many forward passes of the network, of as many rows

Ours and the floor are timed alternately in one process; a ratio is of one such pair, and the table gives the median
and the quartiles over rounds. Drawing is ``sampling.sample`` from given noise for kernels, ``solvers.end`` for solvers
(Heun takes two passes a step, but for the last). With guidance every pass has twice the rows, in both.

    python benchmarks/samplers.py [--device cuda] [--threads 1] [--rounds 15] [--case digits] [--quick] [--json NAME]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from overhead import CASES, CLASSES, RESULTS, Case
from timing import compare, machine
from torch import nn

from rlfusion.diffusion import solvers
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.sampling import sample
from rlfusion.diffusion.schedule import DDPM, Geometric, Rectified, Schedule
from rlfusion.diffusion.solvers import OneStep


@dataclass(frozen=True)
class Sampler:
    """A sampler of the table: a schedule, the network's kind, and a chain or a solver with its passes a step."""

    schedule: Schedule
    kind: str
    chain: Chain = Chain()
    solver: OneStep | None = None
    passes: int = 1


VP, VE, FLOW = DDPM(), Geometric(), Rectified()
SAMPLERS = {
    "DDPM": Sampler(VP, "eps", Chain(kernel="DDPM()")),
    "DDIM(0)": Sampler(VP, "eps", Chain(kernel="DDIM(eta=0.0)")),
    "DDIM(1)": Sampler(VP, "eps", Chain(kernel="DDIM(eta=1.0)")),
    "DDIM(1), guided": Sampler(VP, "eps", Chain(kernel="DDIM(eta=1.0)", guidance=1.0)),
    "DDIM(1), rescaled": Sampler(VP, "eps", Chain(kernel="DDIM(eta=1.0)", guidance=1.0, guidance_rescale=0.7)),
    "Renoise": Sampler(VP, "x0", Chain(kernel="Renoise()")),
    "ReverseSDE": Sampler(VP, "eps", Chain(kernel="ReverseSDE()")),
    "FlowSDE": Sampler(FLOW, "flow", Chain(kernel="FlowSDE()")),
    "CPS": Sampler(FLOW, "flow", Chain(kernel="CPS()")),
    "InstaFlow, DDIM(1)": Sampler(VP, "InstaFlow()", Chain(kernel="DDIM(eta=1.0)")),
    "EDM, DDIM(0)": Sampler(VE, "EDM()", Chain(kernel="DDIM(eta=0.0)")),
    "Langevin": Sampler(VE, "score", Chain(kernel="Langevin()")),
    "Euler": Sampler(FLOW, "flow", solver=solvers.euler),
    "Heun": Sampler(FLOW, "flow", solver=solvers.heun, passes=2),
    "EDM Heun": Sampler(VE, "EDM()", solver=solvers.edm_heun, passes=2),
}


def ours_and_floor(case: Case, sampler: Sampler, device: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """The two functions to time."""
    torch.manual_seed(0)
    net = case.net()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    denoiser = Denoiser(net.to(device), sampler.schedule, sampler.kind)
    chain, label = sampler.chain, torch.arange(case.batch, device=device) % CLASSES
    times = chain.times(denoiser)
    noise = torch.randn(case.batch, len(times), *case.shape, device=device)
    rows = case.batch * (2 if chain.weight else 1)
    held = (
        torch.randn(rows, *case.shape, device=device),
        torch.rand(rows, device=device),
        label.repeat(rows // len(label)),
    )
    last = 1 if sampler.passes == 2 and sampler.schedule(times[-1]).sigma == 0 else 0
    count = sampler.passes * (len(times) - 1) - last

    @torch.no_grad()
    def floor() -> None:
        for _ in range(count):
            net(*held)

    if sampler.solver is None:
        policy = chain.policy(denoiser, tuple(map(str, range(CLASSES))))
        return lambda: sample(policy, noise, times, label), floor
    begin = noise[:, 0] * float(sampler.schedule(times[:1]).sigma)
    return lambda: solvers.end(sampler.solver, denoiser, begin, times, label), floor


def main() -> None:
    """Read the arguments, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: digits and unet-small")
    parser.add_argument("--quick", action="store_true", help="3 rounds of digits")
    parser.add_argument("--json", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    rounds = 3 if args.quick else args.rounds
    records = []
    print(f"{'network':12}{'sampler':22}{'floor ms':>10}{'ratio':>8}   quartiles")
    for name in args.case or (["digits"] if args.quick else ["digits", "unet-small"]):
        for title, sampler in SAMPLERS.items():
            found = compare(*ours_and_floor(CASES[name], sampler, args.device), rounds, args.device, clock)
            records.append({"case": name, "sampler": title, **found})
            ratio = f"{found['ratio']:8.3f}   {found['q1']:.3f} .. {found['q3']:.3f}"
            print(f"{name:12}{title:22}{found['floor_ms']:10.1f}{ratio}", flush=True)
    if args.json:
        held = {"machine": machine(args.device), "rounds": rounds, "cpu_time": args.cpu_time, "records": records}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.json}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
