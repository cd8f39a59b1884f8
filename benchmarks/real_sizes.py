"""Networks of real size with random weights: images a second sampled, walks a second learned from, peak memory.

    (1)  walked    the walk of a rollout item, K steps with all that is kept of them, over K forward passes of the
                   network; and sampled, the whole item with decoding and the reward, in images a second
    (2)  updated   one update of an agent on B walks, over the bare forward and backward passes in it, in the same
                   micro-batches and of the same trained weights: of every noisy step for DDPO, of a window of them for
                   GRPO; for DRaFT-1 of the last step, and of the decoder
    (3)  the floating-point operations a second of the bare passes, forward alone and with the backward pass counted as
         two of them, over those of one square matrix product in bfloat16: the share of the card's measured rate
    (4)  kernels begun, and times that the CPU waits for the card, in an update, for each call of the network
    (5)  on a card, a rollout of the digits network by CUDA graphs (--compile graphs) over one by calls as ever

"sd15" is a U-Net of Stable Diffusion 1.5's size, "sd3" a transformer of Stable Diffusion 3 medium's, at 512 pixels;
"tiny" is for trying this on a CPU. Adapters are trained over frozen weights in ``--dtype``; "all" trains every weight,
in float32 with that arithmetic (autocast). Weights and embeddings are random: the time is that of real ones. The
figures of a card are made by benchmarks/gpu.sh;

    python benchmarks/real_sizes.py --device cpu --case tiny --dtype float32 --batch 2 --steps 4 --matrix 512
"""

import argparse
import gc
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from overhead import CASES as SMALL
from overhead import Bench
from timing import compare, machine, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rlfusion.agents import ddpo, draft, grpo
from rlfusion.common.compiled import compile_calls
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.models import lora
from rlfusion.models.pipelines import Conditions, Family, Net, stable_diffusion, stable_diffusion_3
from rlfusion.models.pipelines.family import plain_grid
from rlfusion.models.pipelines.model import DTYPES, Published
from rlfusion.models.pipelines.scheduler import read
from rlfusion.models.pipelines.space import Decoded
from rlfusion.rewards import ink
from rlfusion.rl.agent import Agent
from rlfusion.rollout import Task, plan, run_item
from rlfusion.training.devices import set_numerics

PROMPTS, ADAPTERS = 2, "LoRA(rank=16)"
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BLOCKS = {"down": "DownEncoder", "up": "UpDecoder"}
KL16 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def autoencoder(widths: tuple[int, ...], **settings: Any) -> nn.Module:
    """Of Stable Diffusion's make."""
    parts = {f"{way}_block_types": (f"{name}Block2D",) * len(widths) for way, name in BLOCKS.items()}
    return diffusers.AutoencoderKL(block_out_channels=widths, **parts, **{"layers_per_block": 2, **settings})


@dataclass(frozen=True)
class Case:
    """A family's network and autoencoder, its scheduler, the side of a latent, and the shapes of embeddings."""

    family: Family
    net: Callable[[], nn.Module]
    vae: Callable[[], nn.Module]
    scheduler: Callable[[], Any]
    side: int
    embeddings: dict[str, tuple[int, ...]]
    kernel: str


CASES = {
    "sd15": Case(
        stable_diffusion.FAMILY,
        lambda: diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        lambda: autoencoder((128, 256, 512, 512)),
        lambda: diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing"),
        64,
        {"text": (77, 768)},
        "DDIM(eta=1.0)",
    ),
    "sd3": Case(
        stable_diffusion_3.FAMILY,
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=64, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
        ),
        lambda: autoencoder((128, 256, 512, 512), **KL16),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        64,
        {"text": (333, 4096), "pooled": (2048,)},
        "FlowSDE(noise=0.7)",
    ),
    "tiny": Case(
        stable_diffusion.FAMILY,
        lambda: diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
        ),
        lambda: autoencoder((32, 32), layers_per_block=1),
        lambda: diffusers.DDIMScheduler(**TABLE, timestep_spacing="trailing"),
        16,
        {"text": (77, 32)},
        "DDIM(eta=1.0)",
    ),
}


def build(case: Case, whole: bool, args: argparse.Namespace) -> Denoiser:
    """The denoiser with adapters that are not 0, or with all its weights to be trained."""
    torch.manual_seed(0)
    dtype, device = DTYPES[args.dtype], args.device
    with torch.device(device):
        model, vae = case.net(), case.vae()
    if args.checkpointing:
        model.enable_gradient_checkpointing()
    model = model if whole else model.to(dtype)
    rows = {name: torch.randn(PROMPTS, *shape) for name, shape in case.embeddings.items()}
    sampling = read(case.scheduler(), plain_grid({}, ()))
    conditions = Conditions(rows, None)
    denoiser = Denoiser(
        Net(model, case.family, conditions, torch.float32 if whole else dtype), sampling.schedule, sampling.kind,
        "bfloat16" if whole and dtype == torch.bfloat16 else "float32",
    )  # fmt: skip
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    denoiser.space = Decoded(vae, model.config["in_channels"], factor, args.decode, False, dtype)
    denoiser.own = Published(sampling, conditions)
    if not whole:
        lora.attach(model, ADAPTERS, 0, case.family.targets, case.family.idle(model))
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            nn.init.normal_(p, std=1e-3)
    return denoiser.to(device)


def matrix_rate(size: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of a square matrix product, the median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = [seconds(lambda: a @ b, device, clock(device)) for _ in range(12)][2:]
    return 2 * size**3 / statistics.median(taken)


def clock(device: str) -> Callable[[], float]:
    """On a card that on the wall; on a CPU, which others use too, the processor time of this process."""
    return time.perf_counter if device.startswith("cuda") else time.process_time


def peak(device: str) -> float:
    """The most memory so far, in GB: of the card, or resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@dataclass(frozen=True)
class Walked:
    """A case, ready to be walked and learned from."""

    case: Case
    denoiser: Denoiser
    args: argparse.Namespace

    @cached_property
    def chain(self) -> Chain:
        return Chain(steps=self.args.steps, spacing="model", kernel=self.case.kernel)

    @cached_property
    def policy(self) -> Policy:
        return self.chain.policy(self.denoiser, ["prompt"] * PROMPTS)

    @cached_property
    def label(self) -> Tensor:
        return torch.arange(self.args.batch, device=self.args.device) % PROMPTS

    @cached_property
    def x(self) -> Tensor:
        shape = (self.denoiser.space.channels, self.case.side, self.case.side)
        return torch.randn(self.args.batch, *shape, device=self.args.device)

    def net(self, rows: slice | Tensor = slice(None)) -> Tensor:
        x = self.x[rows]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.denoiser.precision == "bfloat16"):
            return self.denoiser.net(x, torch.full((len(x),), 500.0, device=x.device), self.label[rows])

    def forward(self) -> None:
        """K forward passes."""
        with torch.no_grad():
            for _ in range(self.args.steps):
                self.net()

    def backward(self, steps: int) -> None:
        """Forward and backward passes of so many steps of every walk."""
        rows = torch.arange(self.args.batch, device=self.args.device).repeat(steps)
        for part in rows.split(self.args.micro_batch):
            self.net(part).float().square().mean().backward()

    def to_the_reward(self) -> None:
        """Forward and backward passes of one step of every walk and of the decoder behind it."""
        for part in torch.arange(self.args.batch, device=self.args.device).split(self.args.micro_batch):
            self.denoiser.space.decode(self.net(part).float()).mean().backward()

    def task(self, settings: Agent) -> Task:
        return Task(
            self.policy, self.chain.grid(self.denoiser), tuple(self.x.shape[1:]), torch.arange(PROMPTS),
            self.denoiser.space.decode, ink, "ink", self.args.device, settings.rollout_spec(self.args.steps),
        )  # fmt: skip


def agents(args: argparse.Namespace, noisy: int) -> dict[str, tuple[Agent, int]]:
    """The agents, one update of a rollout each, and the steps that they learn from; 0 is the last one, through the
    reward.
    """
    plain: dict[str, Any] = {"epochs": 1, "updates_per_epoch": 1, "micro_batch": args.micro_batch, "lr": 1e-6}
    window = max(1, noisy // 2)
    return {
        "ddpo": (ddpo.Config(**plain, kl_loss=0.0, ema_decay=0.0), noisy),
        "grpo": (grpo.Config(**plain, kl_loss=0.0, ema_decay=0.0, window=window), window),
        "draft": (draft.Config(**plain, kl_loss=0.0, ema_decay=0.0), 0),
    }


def counted(function: Callable[[], object]) -> tuple[int, int]:
    """Eq. (4) of a call: kernels, and waits."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        function()
    found = {event.key: event.count for event in profiled.key_averages()}
    kernels = sum(count for name, count in found.items() if name.startswith(("cudaLaunch", "cuLaunch")))
    return kernels, found.get("cudaStreamSynchronize", 0)


def learning(walked: Walked, name: str) -> dict[str, float]:
    """Eq. (2) and (4) of an agent."""
    args = walked.args
    noisy = int((walked.policy.stds(walked.chain.times(walked.denoiser)) > 0).sum())
    settings, steps = agents(args, noisy)[name]
    task = walked.task(settings)
    walks = run_item(task, plan(0, 0, PROMPTS, args.batch // PROMPTS, args.batch, PROMPTS, 0)[0])
    learner = settings.learner(task, None, 0)
    bare = walked.to_the_reward if not steps else lambda: walked.backward(steps)
    found = compare(lambda: learner.update(walks), bare, args.rounds, args.device, clock(args.device), args.warm)
    calls = max(1, steps) * -(-args.batch // args.micro_batch)
    each = {
        "walks_per_s": args.batch / (found["floor_ms"] * found["ratio"] / 1e3),
        "share_of_passes": 1 / found["ratio"],
    }
    each |= {"bare_ms_a_call": found["floor_ms"] / calls, "peak_gb": peak(args.device)}
    if args.device.startswith("cuda"):
        kernels, waits = counted(lambda: learner.update(walks))
        each |= {"kernels_a_call": kernels / calls, "waits_a_call": waits / calls}
    return each


def sampling(walked: Walked) -> dict[str, float]:
    """Eq. (1)."""
    args, settings = walked.args, agents(walked.args, 2)["ddpo"][0]
    item = plan(0, 0, PROMPTS, args.batch // PROMPTS, args.batch, PROMPTS, 0)[0]
    task = walked.task(settings)
    whole = compare(
        lambda: run_item(task, item), walked.forward, args.rounds, args.device, clock(args.device), args.warm
    )
    unscored = replace(task, decode=lambda x: x.new_zeros(len(x), 3, 8, 8))
    alone = compare(lambda: run_item(unscored, item), walked.forward, args.rounds, args.device, clock(args.device), 0)
    return {
        "images_per_s": args.batch / (whole["floor_ms"] * whole["ratio"] / 1e3),
        "walk_share_of_passes": 1 / alone["ratio"],
        "item_share_of_passes": 1 / whole["ratio"],
        "bare_ms_a_call": whole["floor_ms"] / args.steps,
        "peak_gb": peak(args.device),
    }


def run(name: str, whole: bool, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """Eq. (1) to (4) of a case: of adapters, or of all weights."""
    denoiser = build(CASES[name], whole, args)
    walked = Walked(CASES[name], denoiser, args)
    with FlopCounterMode(display=False) as flops:
        torch.no_grad()(walked.net)()
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in denoiser.net.parameters())}
    found["trained"] = sum(p.numel() for p in denoiser.net.parameters() if p.requires_grad)
    found["sampling"] = sampling(walked)
    forward = flops.get_total_flops() / (found["sampling"]["bare_ms_a_call"] / 1e3)
    found["share_of_matrix_rate_forward"] = forward / rate
    for agent in args.agents.split(",") if not whole else ["ddpo"]:
        found[agent] = learning(walked, agent)
    calls = args.batch / min(args.batch, args.micro_batch)
    backward = 3 * flops.get_total_flops() / calls / (found["ddpo"]["bare_ms_a_call"] / 1e3)
    return found | {"share_of_matrix_rate_backward": backward / rate}


def replayed(args: argparse.Namespace) -> dict[str, float]:
    """Eq. (5)."""
    bench = Bench(SMALL["digits"], args.device, clock(args.device))
    task = replace(bench.task, policy=frozen_copy(bench.task.policy))
    compile_calls(task.policy.denoiser.net, "graphs")
    found = compare(
        lambda: run_item(task, bench.item), bench.rollout, args.rounds, args.device, clock(args.device), args.warm
    )
    return {"rollout_ms": found["floor_ms"], "replayed_share": found["ratio"]}


def main() -> None:
    """Run the cases, print them, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="sd15,sd3")
    parser.add_argument("--agents", default="ddpo,grpo,draft")
    parser.add_argument("--weights", default="adapters,all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=16, help="walks, an even number")
    parser.add_argument("--micro_batch", type=int, default=16)
    parser.add_argument("--decode", type=int, default=8, help="samples that are decoded at a time")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrix product")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--nondeterministic", action="store_true", help="the fastest kernels, and TF32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", help="a file for the figures")
    args = parser.parse_args()
    set_numerics(args.threads, args.device, not args.nondeterministic, args.nondeterministic)
    rate = matrix_rate(args.matrix, DTYPES[args.dtype], args.device)
    found: dict[str, Any] = {
        "machine": machine(args.device) | {"python": platform.python_version(), "matrix_tflops": rate / 1e12},
        "versions": {"diffusers": diffusers.__version__, "peft": peft.__version__},
        "settings": {k: v for k, v in vars(args).items() if k != "json"} | {"lora": ADAPTERS},
    }
    if args.device.startswith("cuda"):
        found["digits, graphs"] = replayed(args)
    for name in args.case.split(","):
        for weights in args.weights.split(","):
            found[f"{name}, {weights}"] = one = run(name, weights == "all", rate, args)
            print(f"{name}, {weights}: {json.dumps(one, default=float)}", flush=True)
            if args.json:
                Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
            if args.device.startswith("cuda"):
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
