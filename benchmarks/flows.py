"""``grpo`` at its defaults against the settings that the authors of Flow-GRPO published, on tiny flow pipelines.

    published    their pickscore_sd3: FlowSDE(noise=0.7), lr 3e-4, two updates a rollout, clip 1e-4 of a dimension's
                 ratio, KL .01 of a dimension's divergence, the standard deviation of all rewards, weight decay 1e-4
    defaults     ``agent grpo``, nothing else said

Both are run by rlfusion, with adapters of rank 32 (alpha 64), on the same pipeline of random weights (SD3, FLUX), the
same prompts, groups of 24 (``--group``), 10 steps, the same kernel, and reward (red above blue), for the same number of
rewards. So it compares settings, not programs. The samples that are judged come from the same noise:

    gain       (mean reward - the base's) / standard deviation of the base's rewards
    distance   rms difference to the base's images, in standard deviations of the base's images
    diversity  mean distance of two images of a prompt, over the base's

    python benchmarks/flows.py [--families sd3,flux] [--seeds 0,1,2] [--queries 480] [--group 24] [--out FILE.json]

``--last`` looks at the end of each run alone, which is cheaper.
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
sys.path.append(str(SUPPORT))

from tiny_pipelines import flux, stable_diffusion_3, warm  # noqa: E402

MAKERS = {"sd3": stable_diffusion_3, "flux": flux}
GUIDANCE = {"sd3": 4.5, "flux": 3.5}
"""Of the published settings of each family."""
PROMPTS, STEPS, DRAWN = ("a red cat", "two dogs, 3"), 10, 48
SIZE = 16
"""The side of the images: FLUX's pipeline says 1,024 by itself, which its tiny scheduler cannot shift for."""


def settings(rival: str, latent: int) -> dict[str, Any]:
    """The agent of a rival; latents of so many numbers."""
    if rival == "defaults":
        return {"name": "grpo"}
    once = {"epochs": 1, "updates_per_epoch": 2, "lr": 3e-4, "weight_decay": 1e-4, "pace": None, "step_weight": "none"}
    clip = {"clip_low": 1e-4, "clip_high": 1e-4, "clip_per_dim": True, "dual_clip": None, "advantage_clip": 5.0}
    return {
        "name": "grpo",
        "std": "batch",
        "kl_loss": 0.01 / latent,
        "max_grad_norm": 1.0,
        "ema_decay": 0.9,
        **once,
        **clip,
    }


def drawn(model: rlf.Model) -> torch.Tensor:
    """Samples (prompts, DRAWN, C, H, W) from one noise."""
    labels = torch.arange(len(PROMPTS)).repeat_interleave(DRAWN)
    return rlf.sample(model, labels, seed=1).unflatten(0, (len(PROMPTS), DRAWN))


def spread(images: torch.Tensor) -> float:
    """Of the images of each prompt."""
    return sum(torch.pdist(of.flatten(1)).mean().item() for of in images)


def rewards(images: torch.Tensor) -> torch.Tensor:
    """Of all images."""
    return warm(images.flatten(0, 1), torch.zeros(images.shape[0] * images.shape[1]))


def looked(images: torch.Tensor, start: torch.Tensor) -> dict[str, float]:
    """Gain, distance and diversity."""
    was, unit = rewards(start), start.std(1).square().mean().sqrt()
    return {
        "gain": ((rewards(images).mean() - was.mean()) / was.std()).item(),
        "distance": ((images - start).square().mean().sqrt() / unit).item(),
        "diversity": spread(images) / spread(start),
    }


def trained(family: str, rival: str, seed: int, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run, and what it gives after each rollout, or the last."""
    chain = {"steps": STEPS, "guidance_scale": GUIDANCE[family], "kernel": "FlowSDE(noise=0.7)"}
    pipeline = {"prompts": str(model.parent / "prompts.txt"), "size": SIZE}
    given = {"pipeline": pipeline, "chain": chain, "root": str(model.parent)}
    given |= {
        "rollout": {"prompts": len(PROMPTS), "samples_per_prompt": args.group},
        "lora": "LoRA(rank=32, alpha=64.0)",
    }
    loaded = rlf.load(model, prompts=PROMPTS, chain=chain, pipeline={"size": SIZE})
    latent = loaded.denoiser.space.latent(loaded.card.shape)
    agent = settings(rival, torch.Size(latent).numel())
    run = rlf.finetune(str(model), f"{SUPPORT}/tiny_pipelines.py:warm", agent=agent, updates=10**6, seed=seed, **given)
    start, points, spent, each = drawn(run.model), [], 0.0, len(PROMPTS) * args.group
    while run.queries + each <= args.queries:
        begin = time.process_time()
        next(run)
        spent += time.process_time() - begin
        if args.last and run.queries + each <= args.queries:
            continue
        points.append({"queries": run.queries, "cpu_s": spent, **looked(drawn(run.model), start)})
    return {"family": family, "rival": rival, "seed": seed, "points": points}


def table(runs: list[dict[str, Any]]) -> str:
    """A line for each run: where it ends."""
    lines = ["| family | settings | seed | rewards | gain | distance | diversity | CPU s |", "|---|" + "---|" * 7]
    for run in runs:
        end = run["points"][-1]
        cells = [run["family"], run["rival"], run["seed"], end["queries"]]
        cells += [f"{end[n]:.2f}" for n in ("gain", "distance", "diversity")]
        lines.append("| " + " | ".join(map(str, [*cells, f"{end['cpu_s']:.0f}"])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="sd3,flux")
    parser.add_argument("--rivals", default="published,defaults")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--queries", type=int, default=480)
    parser.add_argument("--group", type=int, default=24, help="walks of a prompt in a rollout")
    parser.add_argument("--last", action="store_true", help="look at the end of a run alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "prompts.txt").write_text("\n".join(PROMPTS))
        for family in args.families.split(","):
            torch.manual_seed(0)
            MAKERS[family]().save_pretrained(Path(place) / family)
        for family, seed, rival in product(args.families.split(","), args.seeds.split(","), args.rivals.split(",")):
            runs.append(trained(family, rival, int(seed), Path(place) / family, args))
            print(table(runs[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(runs))
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "group": args.group, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
