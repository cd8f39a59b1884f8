"""A thousand workers and 64 ranks in virtual time: seconds a step and utilisation at each lag, whole and with faults.

The scheduler of items is the one of real runs (``rlfusion.rollout.simulation``); Ray, the network and the GPUs are not
there. An item takes some 20 s on a worker, an update 20 s on the ranks. "faults": of a thousand starts or items 2 kill
their process, 1 hangs and 1 raises, every 20th place is slow (5 times), a node of 8 leaves every 5 minutes and comes
back after 2, and three ranks in a thousand die with a step (all go back to the last checkpoint then). Each row says
that every item of the final weights was learned from once, and in order.

    python benchmarks/cluster.py [--workers 1000] [--ranks 64] [--steps 16] [--seed 0] [--lags 0 1 2]
"""

import argparse
import time

from rlfusion.rollout import Limits
from rlfusion.rollout.simulation import NO_FAULTS, Faults, Learning, Report, Rollouts, VirtualPool, about, train

FAULTS = Faults(0.002, 0.001, 0.001, slow=0.05, slowness=5.0, outage_every_s=300.0, outage_s=120.0)
KINDS = (("whole", NO_FAULTS, 0.0, 3.0), ("faults", FAULTS, 3e-3, 3.0), ("faults, no twins", FAULTS, 3e-3, 0.0))
COLUMNS = (
    *("", "lag", "s a step", "workers busy", "ranks busy"),
    *("workers lost", "twins", "groups lost", "steps again", "once, in order"),
)


def one(args: argparse.Namespace, lag: int, faults: Faults, kills: float, twin_times: float) -> Report:
    """One run, of as many items a step as workers."""
    limits = Limits(item_s=600.0, item_floor_s=60.0, start_s=120.0, twin_times=twin_times)
    pool = VirtualPool(args.workers, limits, faults, args.seed, about(20.0))
    learning = Learning(args.ranks, 20.0, kills=kills, restart_s=60.0)
    return train(pool, learning, Rollouts(args.steps, args.workers, 8, lag), args.seed)


def row(name: str, lag: int, report: Report, items: int) -> str:
    """A line of the table."""
    steps = [step for step, _ in report.consumed]
    once = len({item for _, item in report.consumed}) == len(steps) and report.consumed == sorted(report.consumed)
    whole = steps == [step for step in range(max(steps) + 1) for _ in range(items)]
    return (
        f"| {name} | {lag} | {report.step_s:.1f} | {report.workers:.0%} | {report.ranks:.0%} | {report.lost} | "
        f"{report.twins} | {report.groups} | {report.replayed} | {'yes' if once and whole else 'NO'} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("workers", 1000), ("ranks", 64), ("steps", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    began = time.process_time()
    print(f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", sep="\n")
    for name, faults, kills, twin_times in KINDS:
        for lag in args.lags:
            print(row(name, lag, one(args, lag, faults, kills, twin_times), args.workers), flush=True)
    size = f"{args.workers} workers, {args.ranks} ranks, {args.steps} steps"
    print(f"\n{size}: {time.process_time() - began:.1f} CPU seconds")


if __name__ == "__main__":
    main()
