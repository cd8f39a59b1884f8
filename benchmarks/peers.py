"""TRL and rlfusion on one Stable Diffusion pipeline of random weights: the gain for so many rewards, and what it costs.

    trl         DDPOTrainer              rlfusion                    agent ddpo
    alignprop   AlignPropTrainer         draft1, draft5, draft, refl  agent draft with K = 1, K = 5 and full, agent refl

All are given the same folder, reward (red above blue), steps and guidance, train all weights on one CPU thread, or with
``--lora`` adapters of rank 4 as TRL has them, and otherwise have their own defaults, or the settings of ``--trl`` and
``--rlfusion``. Each run is a process; rivals take
turns. TRL has a virtual environment of its own, which is made once, with the torch and the diffusers of this one.

AlignPropTrainer's defaults are of 50 steps: the range from which it draws where the gradient begins, (0, 50), is here
(0, the last step), so that the last step always has one; with 5 steps and (0, 50) most of its losses have no gradient.

Every so many queries a run saves its weights, off the clock. A third process then samples from all of them with
diffusers' own pipeline, from one noise:

    gain       (mean reward - the base's) / standard deviation of the base's rewards
    distance   rms difference to the base's images from the same noise, in standard deviations of the base's images
    diversity  mean distance of two images of a prompt, over the base's

peak_mb is the most memory that a process had, ready_mb what it had as training began: libraries, weights and copies;
heap_mb is the most of the C library's memory (glibc's) that was in use during training, beyond that.
Both, and the time until then, are of code that is compiled: the first run of an environment that uv made compiles it.

``--rates 3e-4,1e-3,3e-3`` runs every rival at each of these learning rates. ``--cost`` judges nothing, and tells time
and memory alone: sampling is what takes longest where the latents are large (``--size large``).

    python benchmarks/peers.py [--seeds 0,1,2] [--queries 320] [--rlfusion "agent.lr=1e-3"] [--out FILE.json]
    python benchmarks/peers.py --rivals alignprop,draft1,draft5,draft,refl
"""

import argparse
import copy
import ctypes
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SUPPORT = HERE.parent.parent / "tests" / "support"
TARGETS = "to_k,to_q,to_v,to_out.0"
"""Layers that TRL's pipeline gives adapters."""
PROMPTS, DRAWN = ("a red cat", "two dogs, 3"), 32
SAME = ("torch", "diffusers", "transformers", "accelerate", "peft")
"""Packages of which TRL's environment has the versions of this one."""


class Clock:
    """CPU seconds of this process without those spent ``off`` it, and what a run tells at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lost, self.ready, self.ready_mb = folder, 0.0, 0.0, 0.0
        self.points: list[dict[str, float]] = []
        self.heap = Heap()

    def now(self) -> float:
        return time.process_time() - self.lost

    def begin(self) -> None:
        """Training begins here: what is held now are the libraries, the weights, and what is made of them before."""
        self.ready, self.ready_mb = self.now(), held_mb()
        self.heap.look()
        self.heap.start()

    def point(self, queries: int, save: Callable[[Path], object]) -> None:
        """The weights after so many queries."""
        begin = time.process_time()
        self.points.append({"queries": queries, "cpu_s": self.now() - self.ready})
        save(self.folder / str(queries))
        self.lost += time.process_time() - begin

    def told(self) -> dict[str, Any]:
        cost = {"ready_cpu_s": self.ready, "cpu_s": self.now() - self.ready}
        return {
            **cost,
            "ready_mb": self.ready_mb,
            "peak_mb": most_mb(),
            "heap_mb": self.heap.most(),
            "points": self.points,
        }


class Info(ctypes.Structure):
    """What ``mallinfo2`` of glibc tells."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcd", "mapped", *"fg", "used", *"ij")]


class Heap(threading.Thread):
    """Looks every 5 ms at how much of the C library's memory is in use: what it has beside that is free."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.library, self.looks, self.ended = ctypes.CDLL(None), [], threading.Event()
        self.library.mallinfo2.restype = Info

    def run(self) -> None:
        while not self.ended.wait(0.005):
            self.look()

    def look(self) -> None:
        info = self.library.mallinfo2()
        self.looks.append((info.used + info.mapped) / 2**20)

    def most(self) -> float:
        """The most in use beyond what was at the first look, in MB; 0 where this is the first."""
        self.ended.set()
        self.look()
        return max(self.looks) - self.looks[0]


def held_mb() -> float:
    """The memory that this process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def most_mb() -> float:
    """The most that it has had; ``getrusage`` would tell that of the process that started it, where it had more."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def setting(job: dict[str, Any], config: Callable[..., Any], **more: Any) -> tuple[Any, Any]:
    """A trainer's settings, and the pipeline that it trains."""
    import torch
    from accelerate import PartialState
    from trl import DefaultDDPOStableDiffusionPipeline

    torch.set_num_threads(1)
    PartialState()  # what the trainer logs with before it has made its own
    how = {"sample_num_steps": job["steps"], "sample_guidance_scale": job["guidance"], "seed": job["seed"]}
    how |= {"mixed_precision": "no", "save_freq": 10**9, "train_use_8bit_adam": False, **more, **job["own"]}
    random.seed(job["seed"])
    return config(**how), DefaultDDPOStableDiffusionPipeline(job["model"], use_lora=job["lora"])


def prompt() -> tuple[str, dict[str, Any]]:
    """One of the prompts by chance."""
    return random.choice(PROMPTS), {}


def epochs(trainer: Any, pipe: Any, each: int, job: dict[str, Any], clock: Clock) -> None:
    """One epoch of so many queries after another."""
    pipe.sd_pipeline.set_progress_bar_config(disable=True)
    step = done = 0
    clock.begin()
    for epoch in range(job["queries"] // each):
        step = trainer.step(epoch, step)
        if (epoch + 1) * each >= done + job["every"]:
            done = (epoch + 1) * each
            clock.point(done, lambda to: merged(trainer.accelerator.unwrap_model(pipe.unet)).save_pretrained(to))


def merged(unet: Any) -> Any:
    """A U-Net with its adapters merged into its weights; itself where it has none."""
    layers = [name for name, layer in unet.named_modules() if hasattr(layer, "get_base_layer")]
    plain = copy.deepcopy(unet) if layers else unet
    for name in layers:
        layer = plain.get_submodule(name)
        layer.merge()
        plain.set_submodule(name, layer.get_base_layer())
    return plain


def warm(samples: Any, cond: Any) -> Any:
    """The reward: red above blue, of images (B, 3, H, W)."""
    return 100 * (samples[:, 0] - samples[:, 2]).mean((1, 2))


def trl(job: dict[str, Any], clock: Clock) -> None:
    """DDPOTrainer."""
    from trl import DDPOConfig, DDPOTrainer

    def reward(images: Any, prompts: Any, about: Any) -> tuple[Any, dict[str, Any]]:
        return warm(images, prompts), {}

    config, pipe = setting(job, DDPOConfig)
    trainer = DDPOTrainer(config, reward, prompt, pipe)
    epochs(trainer, pipe, config.sample_batch_size * config.sample_num_batches_per_epoch, job, clock)


def alignprop(job: dict[str, Any], clock: Clock) -> None:
    """AlignPropTrainer."""
    from trl import AlignPropConfig, AlignPropTrainer

    def reward(images: Any, prompts: Any, about: Any) -> tuple[Any, dict[str, Any]]:
        return warm(images, prompts), {}

    last = job["steps"] - 1
    where = {"truncated_rand_backprop_minmax": (0, last), "truncated_backprop_timestep": last}
    config, pipe = setting(job, AlignPropConfig, **where)
    trainer = AlignPropTrainer(config, reward, prompt, pipe)
    epochs(trainer, pipe, config.train_batch_size * config.train_gradient_accumulation_steps, job, clock)


def rlfusion(job: dict[str, Any], clock: Clock) -> None:
    """``rlfusion.finetune``, one update after another."""
    import torch

    import rlfusion as rlf

    torch.set_num_threads(1)
    chain = {"steps": job["steps"], "guidance_scale": job["guidance"]}
    given = {"pipeline": {"prompts": job["prompts"]}, "chain": chain, "root": job["root"], "device": "cpu"}
    given |= {"lora": f"LoRA(rank=4, targets='{TARGETS}')"} if job["lora"] else {}
    own = {"updates": 10**6, "agent": "ddpo"} | AGENTS[job["rival"]] | job["own"]
    run = rlf.finetune(job["model"], f"{HERE}:warm", seed=job["seed"], **given, **own)
    each = run.config.rollout.prompts * run.config.rollout.samples_per_prompt
    clock.begin()
    for metrics in run:
        print(json.dumps({name: round(value, 4) for name, value in metrics.items()}), file=sys.stderr)
        clock.point(run.queries, lambda to: merged(run.model.denoiser.net.model).save_pretrained(to))
        if run.queries + each > job["queries"]:
            return


AGENTS: dict[str, dict[str, Any]] = {
    "rlfusion": {},
    "draft1": {"agent": "draft"},
    "draft5": {"agent": "draft", "agent.steps": 5},
    "draft": {"agent": "draft", "agent.form": "full"},
    "refl": {"agent": "refl"},
}
"""The settings of rlfusion's rivals."""
RIVALS = {"trl": trl, "alignprop": alignprop} | dict.fromkeys(AGENTS, rlfusion)
RATES = {"trl": "train_learning_rate", "alignprop": "train_learning_rate"} | dict.fromkeys(AGENTS, "agent.lr")
"""The setting of each rival that is its learning rate."""
WIDE = {"block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 8}
SIZES = {"tiny": {}, "small": {"sample_size": 32, **WIDE}, "large": {"sample_size": 64, **WIDE}}
"""Settings of the U-Net of a pipeline of each size: of the larger ones the activations are what the memory holds."""


def base(folder: Path, size: str) -> None:
    """The pipeline from which all begin."""
    import torch

    sys.path.append(str(SUPPORT))
    from tiny_pipelines import stable_diffusion

    torch.manual_seed(0)
    pipe = stable_diffusion()
    if SIZES[size]:
        pipe.register_modules(unet=type(pipe.unet).from_config({**pipe.unet.config, **SIZES[size]}))
    pipe.save_pretrained(folder)


def judge(model: Path, runs: list[dict[str, Any]], steps: int, guidance: float) -> None:
    """Write gain, distance and diversity to each point of the runs."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def drawn() -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        how = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": 1.0, "output_type": "pt"}
        return torch.stack([pipe(p, num_images_per_prompt=DRAWN, generator=noise, **how).images for p in PROMPTS])

    def spread(images: torch.Tensor) -> float:
        return sum(torch.pdist(of.flatten(1)).mean().item() for of in images)

    def rewards(images: torch.Tensor) -> torch.Tensor:
        return 100 * (images[:, :, 0] - images[:, :, 2]).mean((2, 3)).flatten()

    start = drawn()
    was, unit = rewards(start), start.std(1).square().mean().sqrt()
    for run in runs:
        for point in run["points"]:
            pipe.unet = UNet2DConditionModel.from_pretrained(Path(run["folder"]) / str(point["queries"]))
            images = drawn()
            point["gain"] = ((rewards(images).mean() - was.mean()) / was.std()).item()
            point["distance"] = ((images - start).square().mean().sqrt() / unit).item()
            point["diversity"] = spread(images) / spread(start)


def environment(place: Path, peer: str) -> Path:
    """The Python of a virtual environment with TRL, which is made where it is not there."""
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        same = [f"{name}=={version(name)}" for name in SAME]
        subprocess.run([python, "-m", "pip", "install", "--quiet", peer, *same], check=True)
    return python


def ran(rival: str, python: Path | str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
    # pip compiles what it installs; what another installer left as sources, the first run that is measured compiles
    lines = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": ""}
    begin = time.time()
    with (folder / "log.txt").open("w") as log:
        failed = subprocess.run([python, HERE, "--run", rival, folder], env=lines, stdout=log, stderr=log).returncode
    if failed:
        sys.exit(f"{rival}, seed {job['seed']}: exit status {failed}\n{(folder / 'log.txt').read_text()[-3000:]}")
    told = json.loads((folder / "told.json").read_text())
    if not told["points"]:
        sys.exit(f"--queries {job['queries']}, --every {job['every']}: {rival} had no look, expected more queries")
    about = {"rival": rival, "seed": job["seed"], "rate": job["rate"], "own": job["own"]}
    return about | {"wall_s": time.time() - begin, "folder": str(folder), **told}


def table(runs: list[dict[str, Any]], target: float) -> str:
    """A line for each run: where it ends, and where it first has the target's gain; of what was not judged, -."""
    head = ["rival", "lr", "seed", "queries", "gain", "distance", "diversity"]
    head += ["cpu_s", "ready_cpu_s", "ready_mb", "peak_mb", "heap_mb"]
    lines = ["| " + " | ".join([*head, f"queries, cpu_s, distance at gain {target:g}"]) + " |", "|" + "---|" * 13]
    for run in runs:
        end, first = run["points"][-1], next((p for p in run["points"] if p.get("gain", -math.inf) >= target), None)
        reached = f"{first['queries']}, {first['cpu_s']:.1f}, {first['distance']:.2f}" if first else "-"
        cells = [run["rival"], run["rate"], run["seed"], end["queries"]]
        cells += [f"{end[name]:.2f}" if name in end else "-" for name in head[4:7]]
        cells += [f"{run['cpu_s']:.1f}", f"{run['ready_cpu_s']:.1f}"]
        cells += [f"{run[name]:.0f}" for name in head[9:12]] + [reached]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def settings(text: str) -> dict[str, Any]:
    """What ``name=value name=value`` says, as a mapping."""
    import yaml

    return {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in text.split())}


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rivals", default="trl,rlfusion", help=", ".join(RIVALS))
    parser.add_argument("--rates", default="default", help="learning rates, or default, each rival's own")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="of the pipeline")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--queries", type=int, default=320)
    parser.add_argument("--every", type=int, default=48, help="queries between two looks at TRL")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--lora", action="store_true", help="train adapters, as TRL's own pipeline does by default")
    parser.add_argument("--cost", action="store_true", help="judge nothing: time and memory alone")
    parser.add_argument("--target", type=float, default=1.0, help="the gain to reach")
    parser.add_argument("--trl", default="", help="settings of TRL's trainers, name=value ...")
    parser.add_argument("--rlfusion", default="", help="settings of rlfusion.finetune, name=value ...")
    parser.add_argument("--peer", default="trl==0.23.1")
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "rlfusion-peers-trl")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def all_runs(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Every rival with every seed and learning rate, in turn."""
    rivals = args.rivals.split(",")
    if unknown := set(rivals) - set(RIVALS):
        sys.exit(f"--rivals {', '.join(sorted(unknown))}: expected some of {', '.join(RIVALS)}")
    peer = environment(args.venv, args.peer) if set(rivals) - set(AGENTS) else Path()
    base(root / "model", args.size)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    same = {"model": str(root / "model"), "prompts": str(root / "prompts.txt"), "root": str(root / "runs")}
    same |= {name: getattr(args, name) for name in ("queries", "every", "steps", "guidance", "lora")}
    runs = []
    for seed, rate, rival in product(map(int, args.seeds.split(",")), args.rates.split(","), rivals):
        own = settings(args.rlfusion if rival in AGENTS else args.trl)
        own |= {} if rate == "default" else {RATES[rival]: float(rate)}
        job = same | {"rival": rival, "seed": seed, "rate": rate, "own": own}
        runs.append(ran(rival, sys.executable if rival in AGENTS else peer, job, root / f"{rival}-{rate}-{seed}"))
        print(rival, rate, seed, f"{runs[-1]['cpu_s']:.1f} CPU s", file=sys.stderr, flush=True)
    return runs


def main() -> None:
    """Run all, judge, print the table and write the JSON."""
    args = arguments()
    if args.run:
        rival, folder = args.run[0], Path(args.run[1])
        clock = Clock(folder)
        RIVALS[rival](json.loads((folder / "job.json").read_text()), clock)
        (folder / "told.json").write_text(json.dumps(clock.told()))
        return
    with tempfile.TemporaryDirectory() as place:
        runs = all_runs(args, Path(place))
        if not args.cost:
            judge(Path(place) / "model", runs, args.steps, args.guidance)
    print(table(runs, args.target))
    if args.out:
        held = {"settings": {k: str(v) for k, v in vars(args).items() if k not in ("run", "out", "venv")}}
        args.out.write_text(json.dumps(held | {"versions": {n: version(n) for n in SAME}, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
