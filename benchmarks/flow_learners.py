"""``awm`` beside ``grpo``, ``nft`` and ``ddpo`` on tiny flow pipelines, at equal gain: rewards, seconds, what is lost.

Adapters (rank 8) of pipelines of random weights (SD3, FLUX, Z-Image), 4 steps (``--steps``), two prompts in groups of
8, reward (red above blue), images of 16 x 16 pixels, without guidance of two answers (FLUX reads its 3.5). ``awm`` and
``nft`` walk by the pipeline's own ODE, ``ddpo`` and ``grpo`` by ``FlowSDE(noise=0.7)``; all are judged by the ODE, from
one noise.
Gain, distance and diversity are those of ``flows.py``. Of each run is told what it had spent when its gain was
``--gain``.

``ddpo`` and ``grpo`` are as ``--agent`` gives them on a pipeline: their learning rate is a limit and follows the
policy. ``awm`` and ``nft`` have the rate of ``RATES`` that was there after the fewest rewards on seed 3, which is not
told; their other settings are the defaults.

Beside them are forms of ``grpo`` (``WINDOWS``): a window of 2 steps; ode, which takes no noise outside of it (MixGRPO);
leap, whose step after it goes as far as 4; start, whose walks of a prompt begin with one noise; flash, both.

    python benchmarks/flow_learners.py [--families sd3,flux,z_image] [--seeds 0,1,2] [--gain 1] [--out FILE.json]
    python benchmarks/flow_learners.py --steps 10 --learners grpo,window,ode,leap,start,flash
"""

import argparse
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

import rlfusion as rlf

SUPPORT = Path(__file__).resolve().parent.parent / "tests" / "support"
sys.path[:0] = [str(SUPPORT), str(Path(__file__).parent)]

from flows import PROMPTS, looked  # noqa: E402
from tiny_pipelines import flux, stable_diffusion_3, z_image  # noqa: E402

MAKERS = {"sd3": stable_diffusion_3, "flux": flux, "z_image": z_image}
GUIDANCE = {"sd3": 1.0, "flux": 3.5, "z_image": 1.0}
LEARNERS, RATES, APART = ("awm", "nft", "grpo", "ddpo"), (1e-3, 3e-3, 1e-2), 3
MIXED = {"window": 2, "outside": "ode"}
WINDOWS: dict[str, dict[str, Any]] = {
    "window": {"window": 2},
    "ode": MIXED,
    "leap": MIXED | {"outside_stride": 4},
    "start": MIXED | {"start": "prompt"},
    "flash": MIXED | {"outside_stride": 4, "start": "prompt"},
}
GROUP, DRAWN, TOKENS, SIDE = 8, 32, 16, 16
ODE, SDE = "DDIM(eta=0.0)", "FlowSDE(noise=0.7)"


def drawn(model: rlf.Model) -> torch.Tensor:
    """Samples (prompts, DRAWN, C, H, W) of the ODE from one noise."""
    labels = torch.arange(len(PROMPTS)).repeat_interleave(DRAWN)
    return rlf.sample(model, labels, seed=1, chain={"kernel": ODE}).unflatten(0, (len(PROMPTS), DRAWN))


def trained(model: Path, learner: str, rate: float | None, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run until it has the gain: what it gives after each rollout."""
    kernel, told = (ODE, {"lr": rate}) if rate else (SDE, {})
    run = rlf.finetune(
        str(model),
        f"{SUPPORT}/tiny_pipelines.py:warm",
        agent={"name": "grpo", **WINDOWS[learner]} if learner in WINDOWS else {"name": learner, **told},
        updates=10**6,
        seed=seed,
        pipeline={"prompts": str(model.parent / "prompts.txt"), "size": SIDE, "max_sequence_length": TOKENS},
        chain={"steps": args.steps, "guidance_scale": GUIDANCE[model.name], "kernel": kernel},
        rollout={"prompts": len(PROMPTS), "samples_per_prompt": GROUP},
        lora="LoRA(rank=8, alpha=16.0)",
        root=str(model.parent),
    )
    start, points, spent = drawn(run.model), [], 0.0
    while run.queries < args.queries:
        begin = time.process_time()
        next(run)
        spent += time.process_time() - begin
        points.append({"queries": run.queries, "cpu_s": spent, **looked(drawn(run.model), start)})
        if points[-1]["gain"] >= args.gain:
            break
    return {"family": model.name, "learner": learner, "lr": rate, "seed": seed, "points": points}


def chosen(model: Path, learner: str, args: argparse.Namespace) -> float | None:
    """The learning rate with which a learner has the gain soonest, or else gets farthest, on a seed apart."""
    if learner in ("ddpo", "grpo", *WINDOWS):
        return None
    runs = {rate: trained(model, learner, rate, APART, args)["points"][-1] for rate in RATES}
    return min(runs, key=lambda rate: (runs[rate]["gain"] < args.gain, runs[rate]["queries"], -runs[rate]["gain"]))


def row(runs: list[dict[str, Any]], gain: float) -> str:
    """The line of a learner on a family: a figure for each seed."""
    ends = [run["points"][-1] for run in runs]

    def told(name: str, digits: int) -> str:
        return " / ".join(f"{end[name]:.{digits}f}" if end["gain"] >= gain else "-" for end in ends)

    first = runs[0]
    cells = [first["family"], first["learner"], f"{first['lr']:g}" if first["lr"] else "default", told("queries", 0)]
    cells += [told("cpu_s", 1), told("diversity", 2), told("distance", 2)]
    cells += [" / ".join(f"{end['gain']:.2f}" for end in ends)]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(MAKERS))
    parser.add_argument("--learners", default=",".join(LEARNERS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=4, help="of the chain")
    parser.add_argument("--queries", type=int, default=320, help="where a run without the gain ends")
    parser.add_argument("--gain", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    print(
        "| family | learner | lr | rewards | CPU s | diversity | distance | gain at the end |\n|---" + "|---" * 7 + "|"
    )
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "prompts.txt").write_text("\n".join(PROMPTS))
        for family, learner in product(args.families.split(","), args.learners.split(",")):
            model = Path(place) / family
            if not model.exists():
                torch.manual_seed(0)
                MAKERS[family]().save_pretrained(model)
            rate = chosen(model, learner, args)
            runs = [trained(model, learner, rate, int(seed), args) for seed in args.seeds.split(",")]
            print(row(runs, args.gain), flush=True)
            found += runs
            if args.out:
                args.out.write_text(
                    json.dumps(
                        {"torch": torch.__version__, "gain": args.gain, "steps": args.steps, "runs": found}, indent=1
                    )
                )


if __name__ == "__main__":
    main()
