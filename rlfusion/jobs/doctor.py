"""``rlfusion doctor``: what is here, and the memory that a fine-tuning with the given settings will take.

``rlfusion doctor`` alone says the former; with the arguments of ``finetune`` it also loads the model for the latter.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Finetune
from rlfusion.jobs import base_model, memory
from rlfusion.jobs.parts import opened
from rlfusion.jobs.pretrain import require_solvable
from rlfusion.training.devices import pick_device

PACKAGES = {
    "torch": "",
    "ray": "",
    "diffusers": "models",
    "transformers": "models",
    "peft": "lora, models",
    "bitsandbytes": "adam8bit",
    "open_clip_torch": "clip",
    "datasets": "datasets",
    "lpips": "lpips",
}
"""The libraries that matter, and the extras that bring them."""


def environment() -> Iterator[tuple[str, str]]:
    """(what, how it is here), a row each."""
    yield "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    for name, extra in PACKAGES.items():
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, f"not installed: pip install 'rlfusion[{extra.partition(',')[0]}]'"
    yield "processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads"
    yield "main memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    yield "free disk here", f"{shutil.disk_usage(Path.cwd()).free / 1e9:.1f} GB"
    if not torch.cuda.is_available():
        yield "GPU", "none that torch can use"
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        yield f"GPU {i}", f"{torch.cuda.get_device_name(i)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {bf16}"


def memory_estimate(settings: Finetune) -> memory.Estimate:
    """The memory of a fine-tuning, by loading its model and one small call of it.

    Raises:
        ConfigError: settings that cannot work.
    """
    device = pick_device(settings.device)
    parts = opened(settings)
    begun = base_model.begin(parts.base, device, Signals(), Progress())
    require_solvable(begun.denoiser, settings.chain)
    policy = settings.chain.policy(begun.denoiser, begun.card.names)
    latent = policy.space.latent(begun.card.shape)
    return memory.estimate(parts.holds, begun.denoiser, policy, settings.chain.times(begun.denoiser), latent)
