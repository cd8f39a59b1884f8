"""Networks of real size with random weights: images a second sampled, walks a second learned from, peak memory.

    (1)  sampled   ``sampling.sample`` of K steps and the autoencoder's decoding, over K forward passes of the network
    (2)  updated   one DDPO update of adapters on B walks of K steps (every transition once, no KL), over the forward
                   and backward passes of those transitions in the same micro-batches, with the same adapters
    (3)  the network's floating-point operations a second in its forward passes, over those of one square matrix
         product in the same precision: the share of the card's measured rate

"sd15" is a U-Net of Stable Diffusion 1.5's size, "sd3" a transformer of Stable Diffusion 3 medium's, at 512 pixels;
"tiny" is for trying this on a CPU. Weights and embeddings are random: the time is that of real ones. The figures of a
card are made by the first of

    python benchmarks/real_sizes.py --device cuda --dtype bfloat16 --batch 4 --steps 20 --json real-sizes-CARD

    python benchmarks/real_sizes.py --device cpu --case tiny --dtype float32 --batch 2 --steps 3 --matrix 512
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from timing import compare, machine, seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rlfusion.agents.ddpo import Config
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.sampling import chain_noise, sample
from rlfusion.models import lora
from rlfusion.models.pipelines import Conditions, Family, Net, stable_diffusion, stable_diffusion_3
from rlfusion.models.pipelines.family import plain_grid
from rlfusion.models.pipelines.model import DTYPES, Published
from rlfusion.models.pipelines.scheduler import read
from rlfusion.models.pipelines.space import Decoded
from rlfusion.rewards import ink
from rlfusion.rollout import Task, plan, run_item
from rlfusion.training.devices import set_numerics

RESULTS, PROMPTS, ADAPTERS = Path(__file__).parent / "results", 2, "LoRA(rank=16)"
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


def build(case: Case, dtype: torch.dtype, device: str, checkpointing: bool) -> Denoiser:
    """The denoiser, with adapters that are not 0."""
    torch.manual_seed(0)
    model, vae = case.net().to(device, dtype), case.vae().to(device)
    if checkpointing:
        model.enable_gradient_checkpointing()
    rows = {name: torch.randn(PROMPTS, *shape) for name, shape in case.embeddings.items()}
    sampling = read(case.scheduler(), plain_grid({}, ()))
    conditions = Conditions(rows, None)
    denoiser = Denoiser(Net(model, case.family, conditions, dtype), sampling.schedule, sampling.kind)
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    denoiser.space = Decoded(vae, model.config["in_channels"], factor, 2, False)
    denoiser.own = Published(sampling, conditions)
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


def run(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Eq. (1) to (3) of a case."""
    case, device, batch, steps = CASES[name], args.device, args.batch, args.steps
    denoiser = build(case, DTYPES[args.dtype], device, args.checkpointing)
    chain = Chain(steps=steps, spacing="model", kernel=case.kernel)
    policy, times = chain.policy(denoiser, ["prompt"] * PROMPTS), chain.times(denoiser)
    shape, label = (denoiser.space.channels, case.side, case.side), torch.arange(batch, device=device) % PROMPTS
    noise = chain_noise((0, "sizes"), range(batch), steps, shape).to(device)
    x, t = noise[:, 0], torch.full((batch,), 500.0, device=device)

    def forward() -> None:
        with torch.no_grad():
            for _ in range(steps):
                denoiser.net(x, t, label)

    def sampled() -> Tensor:
        return denoiser.space.decode(sample(policy, noise, times, label))

    def backward() -> None:
        for part in rows.split(args.micro_batch):
            denoiser.net(x[part], t[part], label[part]).float().square().mean().backward()

    rows = torch.arange(batch, device=device).repeat(int((policy.stds(times) > 0).sum()))
    walking = compare(sampled, forward, args.rounds, device, clock(device))
    with FlopCounterMode(display=False) as counted:
        torch.no_grad()(denoiser.net)(x, t, label)
    settings = Config(epochs=1, updates_per_epoch=1, micro_batch=args.micro_batch, kl_loss=0.0, lr=1e-6, ema_decay=0.0)
    task = Task(
        policy, chain.grid(denoiser), shape, torch.arange(PROMPTS), denoiser.space.decode, ink, "ink", device,
        settings.rollout_spec(steps),
    )  # fmt: skip
    walks = run_item(task, plan(0, 0, PROMPTS, batch // PROMPTS, batch, PROMPTS, 0)[0])
    learner = settings.learner(task, None, 0)
    learning = compare(lambda: learner.update(walks), backward, args.rounds, device, clock(device))
    rate = counted.get_total_flops() * steps / (walking["floor_ms"] / 1e3)
    return {
        "parameters": sum(p.numel() for p in denoiser.net.parameters()),
        "images_per_s": batch / (walking["floor_ms"] * walking["ratio"] / 1e3),
        "sampling_share_of_passes": 1 / walking["ratio"],
        "walks_updated_per_s": batch / (learning["floor_ms"] * learning["ratio"] / 1e3),
        "update_share_of_passes": 1 / learning["ratio"],
        "forward_flops_per_s": rate,
        "share_of_matrix_rate": rate / matrix_rate(args.matrix, DTYPES[args.dtype], device),
        "peak_gb": peak(device),
    }


def main() -> None:
    """Run the cases, print them, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="sd15,sd3")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=4, help="walks, an even number")
    parser.add_argument("--micro_batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrix product")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", default="", help="name below benchmarks/results")
    args = parser.parse_args()
    set_numerics(args.threads, torch.device(args.device))
    found: dict[str, Any] = {
        "machine": machine(args.device) | {"python": platform.python_version()},
        "versions": {"diffusers": diffusers.__version__, "peft": peft.__version__},
        "settings": vars(args) | {"lora": ADAPTERS},
    }
    for name in args.case.split(","):
        found[name] = run(name, args)
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found[name].items()), flush=True)
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if args.json:
        (RESULTS / f"{args.json}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
