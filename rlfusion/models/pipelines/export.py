"""A trained pipeline in diffusers' own format, read back by diffusers' own loader before the save counts.

Adapters are written as ``pytorch_lora_weights.safetensors``; a network that was trained whole as a pipeline folder.
What was written is loaded again, and both networks answer the same questions: another answer is an error.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlfusion.common import shards, storage, streamed
from rlfusion.common.errors import NumericalError
from rlfusion.common.hollow import standing_in
from rlfusion.common.seeding import normal
from rlfusion.common.weights import ADAPTER
from rlfusion.diffusion.space import Space
from rlfusion.models.pipelines import hub, quantized
from rlfusion.models.pipelines.adapters import LORA, adapted, adapted_texts, merged_all, put_on
from rlfusion.models.pipelines.family import Family, Net
from rlfusion.models.pipelines.hollow import network, write_network
from rlfusion.models.pipelines.model import DTYPES, load

ALIKE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
"""How far a reloaded network's answers may be from the trained one's, as a share of the largest."""


def save(folder: Path, net: Net, space: Space, about: dict[str, Any]) -> dict[str, Any]:
    """Write what was trained of ``net`` into ``folder``; ``about`` as it is of what lies there. What is split over
    ranks all of them write, and compare, together.

    Raises:
        NumericalError: what was written, loaded by diffusers, answers otherwise than the trained network.
        StorageError: it cannot be written.
    """
    storage.make_folder(folder)
    path = hub.folder(about["name"], about["variant"])
    if any(ADAPTER in name for name in net.model.state_dict()):
        _save_adapters(folder, path, net)
        saved = {key: held for key, held in about.items() if key != "quantize"}  # they fit the weights as published
        saved |= {"adapters": [*about["adapters"], "."]}
    else:
        _save_pipeline(folder, path, net, about)
        saved = {key: held for key, held in about.items() if key != "scheduler"}  # which the folder has
        saved |= {"name": ".", "variant": "", "adapters": []}
    if shards.roots(net):
        shards.agreed(True)  # the first rank has written all
        verify(net, _reloaded_split(folder, saved, net), space, about)
    elif storage.writes():
        verify(net, reloaded(folder, saved, net.family, about.get("quantize", "none")), space, about)
    return saved


def _written(write: Callable[[], Any], folder: Path) -> None:
    """Write files of diffusers, where this process writes any."""

    def attempt() -> None:
        try:
            write()
        except SafetensorError as error:
            raise OSError(*storage.told(str(error))) from error

    if storage.writes():
        storage.patiently(attempt, folder)


def _save_adapters(folder: Path, path: Path, net: Net) -> None:
    from peft import get_peft_model_state_dict

    pipeline, part = hub.pipeline_class(path), net.family.network
    held = {name: shards.whole(tensor).detach().cpu() for name, tensor in get_peft_model_state_dict(net.model).items()}
    settings = net.model.peft_config["default"].to_dict()  # without it the strength is taken for that of alpha = rank
    layers = {f"{part}_lora_layers": held, f"{part}_lora_adapter_metadata": settings}
    _written(lambda: pipeline.save_lora_weights(str(folder), safe_serialization=True, **layers), folder)


def _save_pipeline(folder: Path, path: Path, net: Net, about: dict[str, Any]) -> None:
    """The pipeline as diffusers writes it, its network tensor by tensor."""
    part, state = net.family.network, net.model.state_dict()
    _written(lambda: _save_beside(folder, path, net, about), folder)
    held = {name: streamed.part(tensor, partial(_whole, tensor)) for name, tensor in state.items()}
    write_network(folder / part, held)


def _save_beside(folder: Path, path: Path, net: Net, about: dict[str, Any]) -> None:
    """All of a pipeline but the weights of its network."""
    model: Any = shards.outline(net).model
    model.save_pretrained = lambda place, **_: model.save_config(place)
    try:
        pipe = load(path, about, given={net.family.network: model})
        adapted_texts(pipe, about["adapters"], net.family).save_pretrained(folder, safe_serialization=True)
    finally:
        del model.save_pretrained


def _whole(tensor: Tensor) -> Tensor:
    full = shards.whole(tensor)
    return full if storage.writes() else torch.empty(0)


def reloaded(folder: Path, about: dict[str, Any], family: Family, quantize: str = "none") -> nn.Module:
    """The network of what lies in ``folder``, by diffusers' own loader; the last adapters unmerged, as trained, on
    weights that are rounded as they were then.
    """
    path = folder if about["name"] == "." else hub.folder(about["name"], about["variant"])
    pipe = load(path, about, without=family.texts)
    if about["adapters"]:
        adapted(pipe, about["adapters"][:-1], family)
        quantized.quantize(getattr(pipe, family.network), quantize, DTYPES[about["dtype"]])
        pipe.load_lora_weights(str(folder), weight_name=LORA)
    return getattr(pipe, family.network)


def _reloaded_split(folder: Path, about: dict[str, Any], like: Net) -> nn.Module:
    """The same, split as the network that was trained: each rank reads its rows."""
    path = folder if about["name"] == "." else hub.folder(about["name"], about["variant"])
    family, device = like.family, shards.own(next(like.parameters())).device
    model, filling = network(path, family.network, DTYPES[about["dtype"]], about["variant"])
    if about["adapters"]:
        pipe = load(path, about, without=family.texts, given={family.network: model})
        filling = merged_all(pipe, model, filling, about["adapters"][:-1], family)
        with standing_in(model):
            put_on(pipe, str(folder), family)
    shards.split(model, device, False, filling)
    return model.to(device)


@torch.no_grad()
def verify(net: Net, model: nn.Module, space: Space, about: dict[str, Any]) -> float:
    """The largest difference between the answers of ``net`` and of the reloaded ``model``, as a share of the largest.

    Raises:
        NumericalError: it is above ``ALIKE``, or a weight is another.
    """
    device = shards.own(next(net.parameters())).device
    shape = space.latent(hub.shape(hub.folder(about["name"], about["variant"]), about["side"], net.family))
    again = Net(model if shards.roots(model) else model.to(device), net.family, net.conditions, DTYPES[about["dtype"]])
    _require_weights(_named(net.model), _named(model))
    a, b = (_answers(one, shape, device) for one in (net, again))
    gap = ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()
    if not gap <= ALIKE[about["dtype"]]:
        raise NumericalError(
            f"the saved model, loaded by diffusers, answers otherwise than the trained one: by {gap:.3g} of the "
            f"largest answer, expected at most {ALIKE[about['dtype']]}"
        )
    return gap


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Weights by name, adapters' under one name whoever attached them."""
    return {re.sub(r"(\.lora_\w+)\.\w+", r"\1", name): tensor for name, tensor in model.state_dict().items()}


def _require_weights(trained: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise NumericalError unless the weights that were read are the trained ones, in the precision that they have."""
    wrong = sorted(trained.keys() ^ read.keys())
    wrong += sorted(n for n in trained.keys() & read.keys() if not _equal(trained[n], read[n]))
    if not shards.agreed(not wrong):
        wrong = wrong or ["a row of another rank"]
        raise NumericalError(
            f"the saved model, loaded by diffusers, has other weights than the trained one: {', '.join(wrong[:3])}"
        )


def _equal(trained: Tensor, read: Tensor) -> bool:
    """Whether the rows of this process, where they are split, are the same in the precision of what was read."""
    ours, theirs = (quantized.plain(shards.own(tensor)) for tensor in (trained, read))
    return torch.equal(ours.to(theirs.dtype), theirs)


def _answers(net: Net, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Answers at three times to noise of one key."""
    x = normal(("export",), range(3), shape).to(device)
    t = torch.tensor([900.0, 500.0, 100.0], device=device)
    label = torch.arange(3, device=device) % net.conditions.count
    weight = {"label": label, "w": torch.full((3,), 2.0, device=device)}
    return net(x, t, weight if net.family.embeds(net.model.config) else label).float()
