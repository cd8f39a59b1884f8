"""Frozen weights in 4 or 8 bits, under adapters that are trained in float32 (QLoRA, Dettmers et al. 2023).

    nf4           bitsandbytes: 16 quantiles of a normal law for each block of 64 weights, times its largest
    int8          bitsandbytes: 8 bits for each row of weights, and for each input (LLM.int8, Dettmers et al. 2022,
                  without its outliers, which would let the samples of a batch decide each other's answers)
    torchao_int8  torchao: 8 bits for each row of weights

All linear layers of the network are rounded, whose answers stay in its dtype; embeddings, norms, convolutions, and what
diffusers keeps in float32 stay as they are. It is done on the CPU, from the weights as they were read, so that the
learner and every worker have the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlfusion.common.errors import ConfigError, shorten

How = Literal["none", "nf4", "int8", "torchao_int8"]
BLOCK = 64
"""Weights that share a scale in ``nf4``."""
APART = ("HunyuanDiTAttentionPool",)
"""Modules that read the weights of their layers themselves: these are not rounded."""


def quantize(model: nn.Module, how: str, dtype: torch.dtype) -> None:
    """Round the linear layers of a network on the CPU, in place; nothing for ``none``.

    Raises:
        ConfigError: the package is not here, or cannot do it on this machine.
    """
    if how == "none":
        return
    make = _makers()[how]
    try:
        for parent, name, layer in list(_layers(model)):
            setattr(parent, name, make(layer, dtype).requires_grad_(False))
    except ImportError as error:
        package = how.partition("_")[0] if how.startswith("torchao") else "bitsandbytes"
        raise ConfigError(f"quantize = {how} needs a newer package {package}: pip install -U {package}") from error
    except RuntimeError as error:  # of bitsandbytes and torchao, where they have no code for this machine
        message = shorten(str(error).partition("\n")[0], 200)
        raise ConfigError(f"quantize = {how}: not available here ({message}); expected none") from error
    model.requires_grad_(False)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = how == "nf4", how == "int8"  # type: ignore[assignment]


def require_whole(about: Mapping[str, Any]) -> None:
    """Raise ConfigError where the weights of the pipeline of ``about`` are rounded, and shall be split over ranks."""
    if how := about.get("quantize"):
        raise ConfigError(
            f"quantize = {how}: rounded weights are not split over ranks, expected learner.shard = none, or none"
        )


def plain(tensor: Tensor) -> Tensor:
    """The numbers of weights that torchao has rounded; another tensor itself."""
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor


def size(model: nn.Module, how: str, itemsize: int) -> int:
    """Bytes of the parameters of a network, which needs no memory for them, once it is quantised from a dtype of so
    many bytes.
    """
    rounded = {id(layer.weight): layer for _, _, layer in _layers(model)} if how != "none" else {}
    total = 0
    for p in model.parameters():
        if id(p) not in rounded:
            total += p.numel() * itemsize
        elif how == "nf4":
            total += -(-p.numel() // 2) + 4 * -(-p.numel() // BLOCK)
        else:
            total += p.numel() + 4 * len(p)
    return total


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The layers that are rounded, with the module that each is in and its name there."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, parent in model.named_modules():
        if type(parent).__name__ in APART:
            continue
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and not kept.intersection([*path.split("."), name]):
                yield parent, name, layer


def _makers() -> dict[str, Callable[[nn.Linear, torch.dtype], nn.Module]]:
    return {"nf4": _nf4, "int8": _int8, "torchao_int8": _torchao_int8}


def _nf4(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    with torch.device("meta"):
        made = Linear4bit(*_form(layer), compute_dtype=dtype, **how)
    made.weight = Params4bit(layer.weight.data, requires_grad=False, module=made, **how)
    return _finished(made, layer)


def _int8(layer: nn.Linear, _: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        made = Linear8bitLt(*_form(layer), has_fp16_weights=False, threshold=0.0)
    made.weight = Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return _finished(made, layer)


def _torchao_int8(layer: nn.Linear, _: torch.dtype) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer


def _form(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def _finished(made: Any, layer: nn.Linear) -> nn.Module:
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.data, requires_grad=False)
    return made.to("cpu")  # where bitsandbytes rounds
