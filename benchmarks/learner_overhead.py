"""What a rollout and an update of each agent cost beyond the bare passes of the networks within them.

    (1)  rollout   an item of the part of walks that the agent takes: noise, steps, log-probabilities, decoding, reward
    (2)  update    ``Learner.update`` behind the guards of a run, with the copy that undoes it

each over its own passes of the network, the reference, the critic and the decoder, forwards and backwards, run again
with the same inputs and nothing between them (``passes``). Beside ours stands "plain": the same passes with the least
that a loop has to do between them, by hand (``plain_loops``). All three are timed alternately in one process.

The teacher of opd has the weights of the policy and a little noise, the samples of sft are noise. sft walks nothing:
its rollout has no passes, and no ratio.

"pipeline" is a tiny Stable Diffusion with 5 steps in calls of 8, "digits" the network of the default run with 20. The
time is this process's, so that others on the machine change little. ``tests/agents/test_overhead.py`` counts
operations.

``--check`` measures ours over the floor by few rounds, the pipeline's unless told otherwise, and holds each against its
ratio in benchmarks/results/NAME.json. What is worse by more than ``SLACK`` is tried again, twice at most. Exit status 1
where one is still worse, or has more passes than it had. Two minutes for all agents.

    python benchmarks/learner_overhead.py [--rounds 9] [--case pipeline] [--agents ddpo,nft] [--json NAME]
    python benchmarks/learner_overhead.py --check [NAME] [--case digits]
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from overhead import RESULTS, show_profile
from timing import alternate, machine, over
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

from outsides import Beside
from passes import Floor
from plain_loops import Rollout, Update, recorded

from rlfusion.agents import AGENTS
from rlfusion.common.tensors import to_pixels
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rewards import ink
from rlfusion.rl.guard import Config as Guards
from rlfusion.rl.guard import Guarded
from rlfusion.rollout import Task, plan, run_item

RECORDED = "learner-overhead-cpu"
"""The file whose table docs/results.md shows."""
SLACK, TRIES = 0.15, 3
LEARNED = {"lr": 1e-7}
OF_AGENT: dict[str, dict[str, dict[str, Any]]] = {
    "pipeline": {"qsm": {"q": "denoised", "noisings": 1}},
    "digits": {},
}


@dataclass(frozen=True)
class Case:
    """What is walked, and how."""

    make: Callable[[], tuple[Denoiser, tuple[int, ...], Callable[[Tensor], Tensor], tuple[type[nn.Module], ...]]]
    prompts: int
    walks: int
    steps: int
    micro_batch: int
    spacing: str


def tiny_pipeline() -> tuple[Denoiser, tuple[int, ...], Callable[[Tensor], Tensor], tuple[type[nn.Module], ...]]:
    """A tiny Stable Diffusion, all of whose weights are trained."""
    from real_sizes import CASES, build

    settings = Namespace(dtype="float32", device="cpu", checkpointing=False, decode=8)
    denoiser = build(CASES["tiny"], True, settings)
    kinds = (type(denoiser.net), ResidualMLP, type(denoiser.space.vae.decoder))  # type: ignore[attr-defined]
    return denoiser, (4, 8, 8), denoiser.space.decode, kinds


def digits() -> tuple[Denoiser, tuple[int, ...], Callable[[Tensor], Tensor], tuple[type[nn.Module], ...]]:
    """The network of the default run, with random weights."""
    net = ResidualMLP((1, 8, 8), 10)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.02)
    return Denoiser(net, Cosine(), "v"), (1, 8, 8), to_pixels, (ResidualMLP,)


CASES = {
    "pipeline": Case(tiny_pipeline, 2, 16, 5, 8, "model"),
    "digits": Case(digits, 10, 120, 20, 2048, "trailing"),
}


class Bench:
    """The functions of one agent in one case, and their floors."""

    def __init__(self, name: str, agent: str, optimizer: str = "adamw") -> None:
        self.agent, case = agent, CASES[name]
        torch.manual_seed(0)
        denoiser, shape, decode, self.kinds = case.make()
        chain = Chain(steps=case.steps, kernel="DDIM(eta=1.0)", spacing=case.spacing)
        policy = chain.policy(denoiser, [str(i) for i in range(case.prompts)])
        usual = {field.name: field.default for field in fields(AGENTS[agent])}["micro_batch"]
        given = {"micro_batch": min(case.micro_batch, usual), **OF_AGENT[name].get(agent, {})}
        config = AGENTS[agent](**LEARNED, **given, optimizer=optimizer)
        spec = config.rollout_spec(case.steps)
        conditions = torch.arange(case.prompts)
        self.task = Task(policy, chain.grid(denoiser), shape, conditions, decode, ink, "ink", "cpu", spec)
        self.task = replace(self.task, outside=Beside(policy, shape))
        self.item = plan(0, 0, case.prompts, case.walks // case.prompts, case.walks, case.prompts, 0)[0]
        self.guarded = Guarded(config.learner(self.task, None, 0), Guards(), None)
        self.batch = self.rollout()
        self.decoder = self.kinds[-1] if len(self.kinds) > 1 else None

    def plain(self, what: str) -> Callable[[], None]:
        """The plain loop of a rollout or an update."""
        done = recorded(getattr(self, what), self.kinds)
        spec = self.task.rollout_spec
        if what == "rollout":
            return Rollout(done, self.decoder, spec.path, spec.end)  # type: ignore[arg-type]
        return Update(self.agent, done, self.decoder, tuple(self.guarded.learner.optimization.named.values()))

    def rollout(self) -> Any:
        return run_item(self.task, self.item)

    def update(self) -> None:
        self.guarded.update(replace(self.batch, version=self.guarded.learner.iteration))


def measure(name: str, agent: str, args: Namespace) -> dict[str, Any]:
    """The record of one agent in one case."""
    bench = Bench(name, agent, args.optimizer)
    record: dict[str, Any] = {"case": name, "agent": agent, "rounds": args.rounds, "load": round(os.getloadavg()[0])}
    for what, ours in (("rollout", bench.rollout), ("update", bench.update)):
        if args.what and what != args.what:
            continue
        bare = Floor(ours, bench.kinds)
        if not bare.passes:
            continue
        if args.profile:
            show_profile(f"{name} {agent}: {what}", ours)
            continue
        functions = {"floor": bare, "plain": bench.plain(what), "ours": ours}
        found = alternate(functions, args.rounds, "cpu", time.process_time)
        floor = found["floor"]
        record[what] = m = {
            "passes": len(bare.passes),
            "floor_ms": 1e3 * statistics.median(floor),
            **over(found["ours"], floor),
            **{"plain" if k == "ratio" else f"plain_{k}": v for k, v in over(found["plain"], floor).items()},
            "over_plain": over(found["ours"], found["plain"])["ratio"],
        }
        print(
            f"{name:10}{agent:6}{what:9}{m['passes']:6} passes{m['floor_ms']:9.1f} ms{m['ratio']:8.3f}"
            f"   {m['q1']:.3f} .. {m['q3']:.3f}   plain{m['plain']:7.3f}   ours / plain{m['over_plain']:7.3f}",
            flush=True,
        )
    return record


def check(args: Namespace) -> tuple[int, list[str]]:
    """How many cells were measured, each of which has its line printed, and those that are worse than their record."""
    told = json.loads((RESULTS / f"{args.check}.json").read_text())
    held = {(one["case"], one["agent"]): one for one in told["records"]}
    measured, worse = 0, []
    for name in args.case or ["pipeline"]:
        for agent in args.agents.split(","):
            bench = Bench(name, agent, told["optimizer"])
            for what in (args.what,) if args.what else ("rollout", "update"):
                recorded = held.get((name, agent), {}).get(what)
                if found := held_against(recorded, getattr(bench, what), bench.kinds, args.rounds or 3):
                    print(f"{name:10}{agent:6}{what:9}{found}", flush=True)
                    measured += 1
                    worse += [f"{name} {agent} {what}"] if "WORSE" in found else []
    return measured, worse


def held_against(recorded: dict[str, Any] | None, ours: Callable[[], Any], kinds: Any, rounds: int) -> str:
    """What a cell is beside its record, in words; "" where it has no passes."""
    bare = Floor(ours, kinds)
    if not bare.passes:
        return ""
    if recorded is None:
        return "   WORSE: it has no record, --json writes one"
    limit, found = recorded["ratio"] + SLACK, [math.inf]
    while min(found) > limit and len(found) <= TRIES:
        timed = alternate({"floor": bare, "ours": ours}, rounds * len(found), "cpu", time.process_time, 1)
        found.append(over(timed["ours"], timed["floor"])["ratio"])
    said = f"{min(found):8.3f}   recorded{recorded['ratio']:7.3f}   "
    if len(bare.passes) > recorded["passes"]:
        return f"{said}WORSE: {len(bare.passes)} passes, recorded {recorded['passes']}"
    if min(found) > limit:
        return f"{said}WORSE by {min(found) - recorded['ratio']:.3f}, in {TRIES} tries"
    return f"{said}holds" + (f", at try {len(found) - 1}" if len(found) > 2 else "")


def main() -> None:
    """Read the arguments, measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), action="append", help="default: all")
    parser.add_argument("--agents", help="default: all")
    parser.add_argument("--what", choices=("rollout", "update"), help="default: both")
    parser.add_argument("--rounds", type=int, help="default: 9; with --check 3, and more where it tries again")
    parser.add_argument("--optimizer", help="of the agents; default: adamw")
    parser.add_argument("--json", metavar="NAME", help="also into benchmarks/results/NAME.json")
    parser.add_argument("--check", nargs="?", const=RECORDED, metavar="NAME", help=f"default: {RECORDED}")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of --json")
    parser.add_argument("--profile", action="store_true", help="print where the time of one call goes")
    args = parser.parse_args()
    require_used(parser, args)
    args.agents, args.optimizer = args.agents or ",".join(AGENTS), args.optimizer or "adamw"
    if args.table:
        print(table(json.loads((RESULTS / f"{args.json}.json").read_text())["records"]))
        return
    torch.set_num_threads(1)
    if args.check:
        measured, worse = check(args)
        if worse:
            sys.exit(f"worse than recorded: {', '.join(worse)}")
        if not measured:
            sys.exit("nothing was measured: what is asked for has no passes (sft walks nothing)")
        return
    args.rounds = args.rounds or 9
    for name in args.case or CASES:
        for agent in args.agents.split(","):
            record = measure(name, agent, args)
            if args.json:
                write(RESULTS / f"{args.json}.json", record, args.optimizer)


def require_used(parser: argparse.ArgumentParser, args: Namespace) -> None:
    """Refuse what an argument makes of no use, names that there are not, and a record that is not there."""
    measuring = ("case", "agents", "what", "rounds", "optimizer", "profile")
    unused = {"check": ("table", "optimizer", "json", "profile"), "table": measuring, "profile": ("json", "rounds")}
    for mode, names in unused.items():
        for name in (name for name in names if getattr(args, mode) and getattr(args, name) not in (None, False)):
            parser.error(f"--{mode} makes no use of --{name}: leave one of them out")
    if args.table and not args.json:
        parser.error("--table: expected --json NAME, the record that it prints")
    known = [*AGENTS]
    for name in (name for name in (args.agents or known[0]).split(",") if name not in known):
        parser.error(f"--agents {name}: expected some of {','.join(known)}")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: expected at least 1")
    record = args.check or (args.json if args.table else None)
    if record and not (RESULTS / f"{record}.json").is_file():
        parser.error(f"{RESULTS / record}.json: there is no such record")


def table(records: list[dict[str, Any]]) -> str:
    """Ours and plain over the floor, a column each agent, as docs/results.md has it."""
    found = {(one["case"], one["agent"]): one for one in records}
    agents = [name for name in AGENTS if ("digits", name) in found or ("pipeline", name) in found]
    lines = [["", *agents], ["---"] * (1 + len(agents))]
    for case, called in (("pipeline", "tiny pipeline"), ("digits", "digits net")):
        for what in ("rollout", "update"):
            for key, title in (("ratio", f"{called}: {what}"), ("plain", "the same, plain")):
                held = [found.get((case, name), {}).get(what) for name in agents]
                lines.append([title, *(f"{one[key]:.2f}" if one else "-" for one in held)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(file: Path, record: dict[str, Any], optimizer: str) -> None:
    """Write a record in the place of one of the same case and agent."""
    told = json.loads(file.read_text())["records"] if file.exists() else []
    found = {(one["case"], one["agent"]): one for one in [*told, record]}
    held = {"machine": machine("cpu"), "optimizer": optimizer, "cpu_time": True, "records": list(found.values())}
    file.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
