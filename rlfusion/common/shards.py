"""Networks whose parameters lie in shards over the ranks: torch's FSDP2 (``fully_shard``), applied in one place.

A parameter that is split is a DTensor: each of N ranks holds neighbouring rows of it, about 1 / N, and the same rows of
its gradient, moments and average. The parameters of a part of the network (each layer of its lists) are gathered while
that part computes, and given up again; so all ranks must call the network equally often, in step.

What is split is computed with through torch, and reaches files and workers through ``own`` (this rank's rows) or
``whole`` (all of them, which all ranks must ask for together).
"""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.hollow import Filling
from rlfusion.common.layers import layers_of

Whole = TypeVar("Whole", bound=nn.Module)

_outlines: "WeakKeyDictionary[nn.Module, nn.Module]" = WeakKeyDictionary()
"""The networks that are split, and each as it was before, without memory for its parameters."""
_exact: "WeakSet[nn.Module]" = WeakSet()
"""Those whose gradients are summed by ``_Tree``."""
_called: "WeakKeyDictionary[nn.Module, int]" = WeakKeyDictionary()
"""How often each has been called."""
NOTED = 256
"""Calls after which those of a network that is not trained are forgotten."""
_kept: "WeakSet[nn.Module]" = WeakSet()
"""Those that stay gathered, within ``kept``."""
_mesh: Any = None
"""The ranks over which they are split."""
_split: tuple[type, ...] = ()
"""The type of what is split; none, and torch's module of it not imported, until something is."""


def is_split(tensor: Any) -> bool:
    """Whether a tensor lies in shards over the ranks."""
    return isinstance(tensor, _split)


def active() -> bool:
    """Whether this process has a network that is split."""
    return bool(_outlines)


def own(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor, in its own memory; of one that is not split, itself."""
    return tensor.to_local() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of one that is split, a copy, which all ranks ask for together."""
    return tensor.full_tensor() if is_split(tensor) else tensor  # type: ignore[attr-defined]


def rows(length: int, rank: int, count: int) -> slice:
    """The rows that a rank holds of a tensor of so many: equal parts but for the last ones, which may be short."""
    each = -(-length // count)
    return slice(min(rank * each, length), min((rank + 1) * each, length))


def held(length: int) -> slice:
    """The rows that this process holds of a tensor of so many; all of them unless it has a network that is split."""
    return rows(length, _mesh.get_local_rank(), _mesh.size()) if _outlines else slice(0, length)


def placed(value: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape from the rows of ``held``: split, where this process has a network that is."""
    if not _outlines:
        return value
    from torch.distributed.tensor import DTensor, Shard

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(value, _mesh, (Shard(0),), run_check=False, shape=torch.Size(shape), stride=stride)


def like(value: Tensor, ours: Tensor) -> Tensor:
    """``value``, all rows of it or split, split (or not) as ``ours`` of the same shape is."""
    if not is_split(ours):
        return whole(value)
    return value if is_split(value) else of_own(value[held(len(value))].clone(), ours)


def of_own(value: Tensor, ours: Tensor) -> Tensor:
    """A tensor that is split as ``ours``, from this rank's rows; of one that is not split, themselves."""
    return placed(value, ours.shape) if is_split(ours) else value


@torch.no_grad()
def put(value: Tensor, ours: Tensor) -> None:
    """Copy ``value``, split or not, into ``ours`` of the same shape, split or not."""
    own(ours).copy_(own(like(value, ours)))


def outline(net: Whole) -> Whole:
    """A network as it was before it was split, without memory for its parameters; one that is not split, itself."""
    return _outlines.get(net, net)  # type: ignore[return-value]


def roots(module: nn.Module) -> list[nn.Module]:
    """The networks in a module that are split."""
    return [part for part in module.modules() if part in _outlines] if _outlines else []


def split(net: nn.Module, device: torch.device, exact: bool, filling: Filling | None = None) -> None:
    """Give each rank of the default group its rows of the parameters of ``net``, on ``device``, in place. Of parameters
    without memory they are read from where ``filling`` says.

    Raises:
        ConfigError: a parameter is a single number; or this torch is too old.
    """
    global _split
    from torch.distributed.tensor import DTensor

    for name, p in net.named_parameters():
        if p.ndim == 0:
            raise ConfigError(
                f"learner.shard = fsdp: parameter {name!r} is a single number, expected one of shape (1,)"
            )
    _split = (DTensor,)
    outline = copy.deepcopy(net, {id(p): _hollow(p) for p in net.parameters()})
    empty = [place for place in _places(net) if place[2].is_meta]
    _shard(net, outline, device, exact)
    if empty:
        _fill(empty, filling or {}, device)


_Place = tuple[nn.Module, str, nn.Parameter]
"""A module, and the name and value of a parameter of its own."""


def _places(net: nn.Module) -> Iterator[_Place]:
    for module in net.modules():
        yield from ((module, name, p) for name, p in module._parameters.items() if p is not None)


def _fill(places: list[_Place], filling: Filling, device: torch.device) -> None:
    """Read this rank's rows of the parameters that had no memory; what was one parameter in two places still is."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, p in places:
        if p not in made:
            own = filling[p](held(len(p))).to(device)
            made[p] = nn.Parameter(placed(own, p.shape), p.requires_grad)
        module._parameters[name] = made[p]


def _hollow(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)


def _shard(net: nn.Module, outline: nn.Module, device: torch.device, exact: bool) -> None:
    """Let FSDP2 have each part of ``net``, and the rest of it. Every part is given up after its forward pass, the root
    too: what would stay would be old once the optimiser has stepped. ``outline`` is the network before.
    """
    global _mesh
    if not can_split():
        raise ConfigError(
            f"learner.shard = fsdp: the FSDP2 of torch {torch.__version__} takes no sums of ours, expected a newer "
            "torch (2.14 does), or learner.shard = none"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if _mesh is None:
        _mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in [*layers_of(net), net]:
        fully_shard(part, mesh=_mesh, reshard_after_forward=True)
    for part in net.modules() if exact else ():
        if isinstance(part, FSDPModule):
            part.set_custom_reduce_scatter(TREE)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    if exact:
        _exact.add(net)
    if "reset_iter_state" in vars(FSDPModule):
        net.register_forward_hook(_forget)
    _outlines[net] = outline
    type(net).__deepcopy__ = _deepcopy  # FSDP2 has none


def _forget(net: Any, _: Any, output: Any) -> None:
    """FSDP2 notes each call for the backward pass, which those of a network that is not trained never have."""
    _called[net] = _called.get(net, 0) + 1
    trained = isinstance(output, Tensor) and output.requires_grad
    if _called[net] % NOTED == 0 and not trained and not any(p.requires_grad for p in net.parameters()):
        net.reset_iter_state()


def can_split() -> bool:
    """Whether this torch has an FSDP2 whose sums may be ours."""
    from torch.distributed.fsdp import FSDPModule

    return {"set_custom_reduce_scatter", "set_force_sum_reduction_for_comms"} <= vars(FSDPModule).keys()


def copied(net: nn.Module, sharing: bool) -> nn.Module:
    """A copy of a network that is split, split likewise; where it is ``sharing``, with the very parameters that are not
    trained.
    """
    twin = copy.deepcopy(_outlines[net])
    held = dict(net.named_parameters())
    _shard(twin, copy.deepcopy(_outlines[net]), own(next(iter(held.values()))).device, net in _exact)
    shared = {name: p.detach() for name, p in held.items() if sharing and not p.requires_grad}
    state = {
        name: shared[name] if name in shared else value.detach().clone() for name, value in net.state_dict().items()
    }
    twin.load_state_dict(state, assign=True)
    for name, p in twin.named_parameters():
        p.requires_grad_(held[name].requires_grad)
    return twin


def _deepcopy(net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy`` of a network that is split: all of it, parameters of its own."""
    if net not in _outlines:
        raise TypeError(f"{type(net).__name__} is a part of a network in shards: the whole network can be copied")
    return copied(net, sharing=False)


def memo(module: nn.Module) -> dict[int, Any]:
    """For ``copy.deepcopy`` of a module: copies of the networks in it that are split, sharing what is not trained."""
    return {id(net): copied(net, sharing=True) for net in roots(module)}


def gathered(module: Whole, here: bool) -> Whole:
    """A copy of the module that is not split, on the CPU; itself where nothing in it is. All ranks ask for it together;
    those that do not want it ``here`` get one without memory for its parameters.
    """
    found = {id(net): _plain(_outlines[net], net, here) for net in roots(module)}
    return copy.deepcopy(module, found) if found else module


def _plain(outline: nn.Module, module: nn.Module, here: bool) -> nn.Module:
    """What is split in ``module``, of which ``outline`` is the outline, gathered tensor by tensor."""
    plain = copy.deepcopy(outline)
    state: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        full = whole(value).detach()
        if here:
            state[name] = full.to("cpu", copy=not is_split(value))
    plain.load_state_dict(state, strict=here, assign=True)
    return plain


def layer(module: nn.Module, name: str, here: bool) -> nn.Module:
    """A copy of the part of ``module`` of this name, as of ``gathered``: for what has one layer at a time."""
    part = module.get_submodule(name)
    for at, net in module.named_modules():
        if net in _outlines and f"{name}.".startswith(f"{at}." if at else ""):
            return _plain(_outlines[net].get_submodule(name[len(at) :].lstrip(".")), part, here)
    return copy.deepcopy(part)


def agreed(well: bool) -> bool:
    """Whether all ranks of the default group say so; where nothing is split, whether this process does."""
    if not _outlines:
        return well
    told = torch.tensor(int(well))
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN)
    return bool(told)


class _Tree:
    """The reduce-scatter of FSDP2 as a tree of neighbours, so that its sum does not depend on the number of ranks.
    Outside of ``summed`` all ranks have computed alike, and each keeps its own.
    """

    summing = False

    def allocate(self, size: Iterable[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        parts = input_tensor.view(group.size(), -1)
        if self.summing:
            parts = torch.empty_like(parts)
            torch.distributed.all_to_all_single(parts, input_tensor.view_as(parts), group=group)
            output_tensor.copy_(tree(list(parts)))
        else:
            output_tensor.copy_(parts[group.rank()])


TREE = _Tree()


def tree(parts: list[Tensor]) -> Tensor:
    """The sum of parts, neighbours first, as a binary tree."""
    while len(parts) > 1:
        paired = [a + b for a, b in zip(parts[::2], parts[1::2])]
        parts = paired + parts[len(paired) * 2 :]
    return parts[0]


@contextmanager
def summed() -> Iterator[None]:
    """Within the context gradients are those of other work on each rank, and are added up."""
    TREE.summing = True
    try:
        yield
    finally:
        TREE.summing = False


@contextmanager
def calls(module: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Within the context, how often each part of what is split is called with gradients."""
    found: Counter[nn.Module] = Counter()

    def called(part: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled():
            found[part] += 1

    parts = [part for net in roots(module) for part in [*layers_of(net), net]]
    hooks = [part.register_forward_pre_hook(called) for part in parts]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def kept(module: nn.Module) -> Iterator[None]:
    """Within the context what is split of ``module`` stays gathered once it has been called: for derivatives of its
    derivatives, which look at the parameters again after the backward pass.
    """
    nets: list[Any] = roots(module)
    _keep(nets, True)
    _kept.update(nets)
    try:
        yield
    finally:
        _keep(nets, False)
        for net in nets:
            _kept.discard(net)
            for part in [*layers_of(net), net]:
                part.reshard()


def _keep(nets: list[Any], keep: bool) -> None:
    for net in nets:
        net.set_reshard_after_forward(not keep)
        net.set_reshard_after_backward(not keep)


def are_kept(module: nn.Module) -> bool:
    """Whether what is split of ``module`` is ``kept``."""
    return any(net in _kept for net in roots(module))


@contextmanager
def unreduced(module: nn.Module) -> Iterator[None]:
    """Within the context gradients stay on their rank, whole, until a backward pass after it takes them along."""
    nets: list[Any] = roots(module)
    for net in nets:
        net.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for net in nets:
            net.set_requires_gradient_sync(True)
