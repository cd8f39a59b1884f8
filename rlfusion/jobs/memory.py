"""Estimate of a fine-tuning's memory before it begins: tensors by count, activations from a small first sample.

With n bytes of trained and f of frozen weights, and A(b) what one call of the network on b samples keeps for the
backward pass, each storage once, measured at b = 1 and 2 and a straight line from there:

    (1)  weights n + f,   gradients n,   the optimiser's moments (AdamW: 2 n, in 8 bits n / 2),   their average n
         (none where its decay is 0)
    (2)  copies of what is trained: the rollouts' in this process, the learner's own (a reference, older weights), the
         monitor's base, n each; and the guard's, to undo an update: weights, moments, average and the learner's own
         copies, once, or 1 + 3 for rollback
    (3)  A(rows) at once, of the micro-batch, or of all transitions that a fused learner takes; and where activations
         are made again (checkpointing), those of the largest part that is made again at once
    (4)  decoding with a gradient: what the space keeps, by sample, of one chunk at most; the same of its largest part
    (5)  a critic of c bytes: its weights and gradients, 2 c, its optimiser's moments, and what undoes an update of it
    (6)  of a network that is split over N ranks, (1), (2) and (5) / N; and its largest layer whole, twice: that which
         computes, and the next, which is gathered meanwhile. (3) and (4) are not measured

Scratch space of single operations is not counted, and nothing that the reward itself takes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rlfusion import models
from rlfusion.common import hollow, layers, shards
from rlfusion.common.weights import ADAPTER
from rlfusion.diffusion.denoiser import Denoiser, guidance_in
from rlfusion.diffusion.policy import Policy
from rlfusion.rl.critic import COPY
from rlfusion.training import optimizers

FUNCTION = "_gradient_checkpointing_func"
"""By which diffusers' modules make activations again."""

Estimate = dict[str, int]
"""Bytes by what they are for."""


class Holds(NamedTuple):
    """What a fine-tuning holds beside its model: see Eq. (1) to (6).

    Attributes:
        here: rollouts are collected in this process, with a copy of what is trained.
        copies: of what is trained that the learner has beside it.
        watched: the monitor has one more, if the chain has noise.
        undo: times that all that an update changes is kept, to undo it.
        optimizer: of the learner, by its name.
        rows: samples that have activations at once.
        halves: guidance makes its two answers one after the other.
        decodes: samples are decoded with a gradient, which is the reward's own.
        ranks: over which all but activations is split (these are then not measured); 1 for none.
        critic: the network of a critic that is learned, by its text; "" for none.
        teacher: another model teaches, which counts as much as the one that learns.
        averaged: an average of what is trained is kept.
    """

    here: bool
    copies: int
    watched: bool
    undo: int
    optimizer: str
    rows: int
    decodes: bool
    ranks: int = 1
    critic: str = ""
    teacher: bool = False
    averaged: bool = True
    halves: bool = False


def kept(call: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that ``call`` keeps for its backward pass beside the module's own weights, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters() if not _is_wrapper(p)}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not _is_wrapper(x):
            held[x.untyped_storage().data_ptr()] = x
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # alive until the storages are counted, so that none is given to another tensor
        total = sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in own)
    del result
    return total


def _is_wrapper(x: Tensor) -> bool:
    """Whether a tensor has no storage of its own, but those in it: weights that are rounded, which none computes."""
    return is_traceable_wrapper_subclass(x)


def line(measured: Callable[[int], int], count: int) -> int:
    """What ``measured`` gives at ``count``, by a straight line through 1 and 2."""
    one, two = measured(1), measured(2)
    return max(0, one + (count - 1) * (two - one))


def activations(policy: Policy, times: Tensor, shape: tuple[int, ...], count: int, halves: bool = False) -> int:
    """Eq. (3): bytes that one step of ``count`` samples of latents (*shape) keeps; with ``halves`` one answer of it."""
    asked = ((guidance_in(policy) if halves else None) or policy).denoiser
    device, t = next(policy.parameters()).device, times[len(times) // 2]

    def measured(rows: int) -> int:
        x, label = torch.zeros(rows, *shape, device=device), torch.zeros(rows, dtype=torch.int64, device=device)
        part = _largest_part(policy, lambda: asked(x, t, label))
        return part + kept(lambda: asked(x, t, label).x0, policy)

    return line(measured, count)


def _largest_part(module: nn.Module, call: Callable[[], Any]) -> int:
    """The most bytes that one checkpointed part of ``module`` keeps when it is made again; 0 where there is none."""
    parts = [m for m in module.modules() if FUNCTION in vars(m)]
    held, most = [vars(m)[FUNCTION] for m in parts], [0]

    def measured(function: Callable[..., Any], *inputs: Any) -> Any:
        most.append(kept(lambda: function(*inputs), module))
        return function(*inputs)

    try:
        for part in parts:
            vars(part)[FUNCTION] = measured
        call()
    finally:
        for part, own in zip(parts, held):
            vars(part)[FUNCTION] = own
    return max(most)


def decoding(policy: Policy, shape: tuple[int, ...], count: int) -> int:
    """Eq. (4): bytes that decoding ``count`` latents (*shape) with a gradient holds, of one chunk at most."""
    device = next(policy.parameters()).device
    held = getattr(policy.space, "vae", nn.Module())

    def measured(rows: int) -> int:
        z = torch.zeros(rows, *shape, device=device, requires_grad=True)
        return _largest_part(held, lambda: policy.space.decode(z)) + kept(lambda: policy.space.decode(z), held)

    return line(measured, min(count, policy.space.chunk))


def estimate(holds: Holds, denoiser: Denoiser, policy: Policy, times: Tensor, shape: tuple[int, ...]) -> Estimate:
    """Eq. (1) to (6) of a fine-tuning whose latents are of ``shape``; the denoiser has its adapters, on its device."""
    sizes = [(p.requires_grad, p.numel() * p.element_size()) for p in denoiser.parameters()]
    trained = sum(size for wanted, size in sizes if wanted)
    frozen = sum(size for wanted, size in sizes if not wanted)
    noisy = bool((policy.stds(times) > 0).any())
    wanted = [p for p in denoiser.parameters() if p.requires_grad]
    moments, rows = optimizers.state_bytes(optimizers.parse(holds.optimizer), wanted), holds.rows
    vae = getattr(policy.space, "vae", None)
    critic = of_critic(holds, denoiser, shape)
    found = of_weights(holds._replace(watched=holds.watched and noisy), frozen, trained, moments, critic)
    found["autoencoder"] = sum(p.numel() * p.element_size() for p in vae.parameters()) if vae is not None else 0
    for net in shards.roots(denoiser):
        found["layers that are gathered"] = 2 * layers.largest(net)
        return found
    more = {f"activations of {rows} samples": activations(policy, times, shape, rows, holds.halves)}
    if holds.decodes:
        more[f"decoding {rows} samples with a gradient"] = decoding(policy, shape, rows)
    if holds.halves:  # a step has its activations once those of decoding are gone
        more = dict([max(more.items(), key=lambda held: held[1])])
    return found | more


class CriticBytes(NamedTuple):
    """Those of a critic's weights, and of its optimiser's moments."""

    weights: int = 0
    moments: int = 0


NO_CRITIC = CriticBytes()


def of_critic(holds: Holds, denoiser: Denoiser, shape: tuple[int, ...]) -> CriticBytes:
    """A copy of the network has its size without adapters, any other network that of itself for one class."""
    if not holds.critic:
        return NO_CRITIC
    if holds.critic == COPY:
        weights = [p for name, p in denoiser.named_parameters() if ADAPTER not in name]
    else:
        with hollow.parameters():
            weights = [*models.make_net(holds.critic, shape, 1).parameters()]
    return CriticBytes(
        sum(p.numel() * p.element_size() for p in weights),
        optimizers.state_bytes(optimizers.parse(holds.optimizer), weights),
    )


def of_weights(holds: Holds, frozen: int, trained: int, moments: int, critic: CriticBytes = NO_CRITIC) -> Estimate:
    """Eq. (1), (2) and (5), of bytes of frozen and trained weights, of the optimiser's moments, and of a critic."""
    copies = holds.here + holds.copies + holds.watched
    average = holds.averaged * trained
    undone = (1 + holds.copies) * trained + average + moments + sum(critic)
    split = {
        "network, frozen": frozen,
        "network, trained": trained,
        "gradients and optimiser": trained + moments,
        "average": average,
        "copies of what is trained": copies * trained,
        "critic, its gradients and optimiser": 2 * critic.weights + critic.moments,
        "to undo an update": holds.undo * undone,
        "teacher": holds.teacher * (frozen + trained),
    }
    return {name: -(-size // holds.ranks) for name, size in split.items()}


def described(found: Estimate) -> str:
    """An estimate in a line."""
    parts = ", ".join(f"{name} {size / 1e9:.3g}" for name, size in found.items() if size)
    return f"{sum(found.values()) / 1e9:.3g} GB: {parts}"
