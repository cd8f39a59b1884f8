"""What five published denoisers are, counted on the meta device, without weights: parameters, FLOPs, activations.

    python benchmarks/scaling_models.py      # writes benchmarks/results/scaling-models.json; some minutes, no GPU

The networks are diffusers' own classes at the published settings. A forward and a backward pass of one sample run on
the meta device, where nothing is computed or held: torch's flop counter adds up the FLOPs, and what autograd keeps is
added up storage by storage. Attention is counted as a fused kernel has it: it keeps its inputs, its output and a number
a row.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

OUT = Path(__file__).parent / "results" / "scaling-models.json"
RANK = 32
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
FLASH_BACKWARD = 2.5
"""Products of a fused attention's backward pass, of those of its forward pass."""


class Fused(torch.autograd.Function):
    """Attention (B, H, L, D) as a fused kernel keeps it; its values are not needed here."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        Fused.flops += 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        Fused.flops += FLASH_BACKWARD * 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    flops = 0.0


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """In the place of torch's."""
    return Fused.apply(query, key, value)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.zeros(*shape, dtype=dtype, device="meta")


def unet(cross: int, size: int, **settings: Any) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """A U-Net of Stable Diffusion, and a call of it at ``size`` pixels."""
    from diffusers import UNet2DConditionModel

    xl = settings.get("addition_embed_type") == "text_time"
    more = {"text_embeds": zeros(1, 1280), "time_ids": zeros(1, 6)} if xl else {}

    def call(net: nn.Module) -> Tensor:
        x, text = zeros(1, 4, size // 8, size // 8).requires_grad_(), zeros(1, 77, cross)
        return net(x, zeros(1), text, added_cond_kwargs=more).sample

    return lambda: UNet2DConditionModel(cross_attention_dim=cross, **settings), call


def sd3(pixels: int = 1024, **settings: Any) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """A transformer of Stable Diffusion 3, and a call of it."""
    from diffusers import SD3Transformer2DModel

    def call(net: nn.Module) -> Tensor:
        x = zeros(1, 16, pixels // 8, pixels // 8).requires_grad_()
        return net(x, zeros(1, 333, 4096), zeros(1, 2048), zeros(1)).sample

    common = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "out_channels": 16, "in_channels": 16}
    return lambda: SD3Transformer2DModel(sample_size=128, qk_norm="rms_norm", **common, **settings), call


def flux(pixels: int = 1024) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """The transformer of FLUX.1, and a call of it."""
    from diffusers import FluxTransformer2DModel

    def call(net: nn.Module) -> Tensor:
        tokens = (pixels // 16) ** 2
        x, text = zeros(1, tokens, 64).requires_grad_(), zeros(1, 512, 4096)
        given = {"img_ids": zeros(tokens, 3), "txt_ids": zeros(512, 3), "guidance": zeros(1)}
        return net(x, text, zeros(1, 768), zeros(1), **given).sample

    return lambda: FluxTransformer2DModel(guidance_embeds=True), call


def qwen(pixels: int = 1024) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """The transformer of Qwen-Image, and a call of it."""
    from diffusers import QwenImageTransformer2DModel

    def call(net: nn.Module) -> Tensor:
        side = pixels // 16
        x, text = zeros(1, side * side, 64).requires_grad_(), zeros(1, 512, 3584)
        given = {"encoder_hidden_states_mask": torch.ones(1, 512, dtype=torch.bool, device="meta")}
        return net(x, text, timestep=zeros(1), img_shapes=[[(1, side, side)]], **given).sample

    return lambda: QwenImageTransformer2DModel(), call


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192}

MODELS: dict[str, tuple[int, Callable[[], tuple[Any, Callable[[nn.Module], Tensor]]]]] = {
    "SD 1.5": (512, lambda: unet(768, 512, attention_head_dim=8)),
    "SDXL": (1024, lambda: unet(2048, 1024, **XL)),
    "SD 3.5 medium": (1024, lambda: sd3(dual_attention_layers=tuple(range(13)), **MEDIUM)),
    "SD 3.5 large": (1024, lambda: sd3(**LARGE)),
    "12 B flow (FLUX.1)": (1024, flux),
    "20 B flow (Qwen-Image)": (1024, qwen),
}
"""By name: pixels of a side, and what makes and calls it."""


def kept(call: Callable[[], Tensor], net: nn.Module) -> tuple[Tensor, int]:
    """The answer, and the bytes that autograd keeps for it beside the weights, each storage once."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    held: dict[int, int] = {}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        held[storage._cdata] = storage.nbytes()
        alive.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    return out, sum(size for at, size in held.items() if at not in own)


def adapters(net: nn.Module) -> int:
    """Parameters of adapters of rank ``RANK`` on the attentions."""
    linear = [m for name, m in net.named_modules() if name.endswith(ADAPTED) and isinstance(m, nn.Linear)]
    return sum(RANK * (m.in_features + m.out_features) for m in linear)


def counted(pixels: int, make: Any, call: Callable[[nn.Module], Tensor]) -> dict[str, Any]:
    """All that ``scaling.py`` reckons with, of one sample."""
    with torch.device("meta"):
        net = make().to(torch.bfloat16)
    Fused.flops = 0.0
    with FlopCounterMode(display=False) as counter:
        out, activations = kept(lambda: call(net), net)
        forward = counter.get_total_flops() + Fused.flops
        out.sum().backward()
    total = counter.get_total_flops() + Fused.flops
    net.enable_gradient_checkpointing()
    net.train()
    _, checkpointed = kept(lambda: call(net), net)
    return {
        "pixels": pixels,
        "parameters": sum(p.numel() for p in net.parameters()),
        "adapters": adapters(net),
        "latent": 4 * (pixels // 8) ** 2 if "UNet" in type(net).__name__ else 16 * (pixels // 8) ** 2,
        "forward": forward,
        "backward": total - forward,
        "activations": activations,
        "checkpointed": checkpointed,
    }


def main() -> None:
    """Count every model, and write what was counted."""
    nn.functional.scaled_dot_product_attention = attention
    found = {}
    for name, (pixels, parts) in MODELS.items():
        found[name] = counted(pixels, *parts())
        print(name, found[name], flush=True)
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
