"""Files of LoRA as they are found: made by peft, by diffusers and in kohya's layout, with random weights."""

from pathlib import Path

import safetensors.torch
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

TARGETS = ("to_q", "to_v")
RANK, ALPHA = 2, 6.0
STRENGTH = ALPHA / RANK

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""A (rank, in) and B (out, rank) of each adapted layer, by its name in the model."""


def adapted_layers(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]


def factors(model: nn.Module, targets: tuple[str, ...] = TARGETS, seed: int = 7, std: float = 0.3) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name in adapted_layers(model, targets):
        layer = model.get_submodule(name)
        a, b = (torch.randn(*s, generator=draw) for s in ((RANK, layer.in_features), (layer.out_features, RANK)))
        found[name] = (std * a, std * b)
    return found


def merge(model: nn.Module, held: Factors, scale: float = 1.0) -> None:
    """W + scale alpha / rank B A, written down by hand."""
    with torch.no_grad():
        for name, (a, b) in held.items():
            model.get_submodule(name).weight += scale * STRENGTH * (b @ a)


def _filled(model: nn.Module, held: Factors) -> None:
    with torch.no_grad():
        for name, (a, b) in held.items():
            layer = model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)


def by_peft(model: nn.Module, held: Factors, folder: Path) -> Path:
    """The folder that ``PeftModel.save_pretrained`` makes."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    wrapped = get_peft_model(model, config)
    _filled(wrapped.get_base_model(), held)
    wrapped.save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def by_diffusers(model: nn.Module, held: Factors, folder: Path, pipeline=StableDiffusionPipeline) -> Path:
    """What ``save_lora_weights`` writes, with peft's settings in its header."""
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    _filled(model, held)
    part = "unet" if hasattr(pipeline, "load_lora_into_unet") else "transformer"
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(model)}
    layers |= {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    pipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


def by_kohya(held: dict[str, Factors], file: Path) -> Path:
    """kohya's names of the layers below each prefix (lora_unet, lora_te), and an alpha of each."""
    tensors = {}
    for prefix, layers in held.items():
        for name, (a, b) in layers.items():
            stem = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
            tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    safetensors.torch.save_file(tensors, file, {"ss_network_module": "networks.lora"})
    return file
