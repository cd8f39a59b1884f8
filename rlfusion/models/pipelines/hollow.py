"""The network of a pipeline without memory for its parameters, and where the rows of each are in the pipeline's files.

It is what diffusers' own loader makes of them: built on the meta device under the precision that is asked for, its
buffers as they are built or saved.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlfusion.common import hollow, storage, streamed
from rlfusion.common.errors import ConfigError, OutOfMemory, foreseen
from rlfusion.models import lora
from rlfusion.models.pipelines import hub

SHARD = 10 * 10**9
"""The largest file of weights that diffusers writes."""


class Network(NamedTuple):
    """A network without memory for its parameters, and where the rows of each are."""

    model: nn.Module
    filling: hollow.Filling


def network(path: Path, component: str, dtype: torch.dtype, variant: str = "") -> Network:
    """The ``component`` of the pipeline in ``path``, in ``dtype`` but for what its class keeps in float32.

    Raises:
        ConfigError: no files of weights in safetensors, or files of another network.
    """
    made, place = _class(path, component), path / component
    try:
        with _default(dtype), hollow.parameters():
            model = made.from_config(made.load_config(place)).eval()
        model.register_to_config(_name_or_path=str(place))
        hollow.require_buffers(model, made.__name__)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if _in_float32(made, name) else dtype)
        files, names = _files(model, place, variant)
        return Network(model, hollow.filling(model, files, names))
    except ConfigError:
        raise
    except hub.DAMAGED as error:
        if isinstance(foreseen(error), OutOfMemory):
            raise
        raise ConfigError(f"weights of {str(place)!r} cannot be loaded: {hub.first_line(error)}") from error


def _class(path: Path, component: str) -> Any:
    named = hub.index(path).get(component)
    made = hub.class_named(named[1]) if isinstance(named, list) and len(named) == 2 else None
    if not isinstance(made, type):
        raise ConfigError(f"{str(path / hub.INDEX)!r} names the {component} {named!r}: diffusers has no such class")
    return made


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Within the context numbers are made in this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _in_float32(made: Any, name: str) -> bool:
    """Whether a class keeps a parameter in float32 whatever is asked for."""
    return bool({*(made._keep_in_fp32_modules or ())} & {*name.split(".")})


def _files(model: Any, place: Path, variant: str) -> tuple[hollow.Files, Mapping[str, str]]:
    """The files of a network's weights, and the name in them of each of its tensors: they may be older than it, and
    have more than it has.
    """
    places, single = _weights(place, variant)
    names = {name: name for name in places}
    if single:
        model._fix_state_dict_keys_on_load(names)
    wanted = {name: names.get(name, name) for name in model.state_dict()}
    return hollow.Files({at: places[at] for at in wanted.values() if at in places}), wanted


def _weights(place: Path, variant: str) -> tuple[dict[str, Path], bool]:
    """The file of each tensor, and whether that is one for all; of the variant, where the network has one.

    Raises:
        OSError: there is none.
    """
    single, several = _names()
    stem, end = single.rsplit(".", 1)
    first, kind, last = several.rsplit(".", 2)
    for part in [f"{variant}.", ""] if variant else [""]:
        for index in (place / f"{first}.{kind}.{part}{last}", place / f"{first}.{part}{kind}.{last}"):
            if index.is_file():
                held = json.loads(index.read_text())["weight_map"]
                return {name: place / Path(file).name for name, file in held.items()}, False
        if (file := place / f"{stem}.{part}{end}").is_file():
            return dict.fromkeys(hollow.Files.of(file).files, file), True
    raise OSError(f"there is no {single} and no {several}")


def _names() -> tuple[str, str]:
    """How diffusers calls a file of weights, and the index of several."""
    library = hub.diffusers().utils
    return library.SAFETENSORS_WEIGHTS_NAME, library.SAFE_WEIGHTS_INDEX_NAME


def merged(model: nn.Module, filling: hollow.Filling, put_on: Callable[[], None]) -> hollow.Filling:
    """Where the rows are of a network with the adapters that ``put_on`` gives it merged into its weights, layer by
    layer as peft does it. They are to be taken off again.
    """
    found = dict(filling)
    with hollow.standing_in(model):
        put_on()
        layers: list[Any] = [layer for _, layer in lora.layers_of(model)]
    for layer in layers:
        weight = layer.get_base_layer().weight
        for adapter in layer.active_adapters:
            found[weight] = _plus(found[weight], layer, adapter)
    return found


def _plus(rows: hollow.Rows, layer: Any, adapter: str) -> hollow.Rows:
    """The rows of a layer's weight with those of an adapter on them."""

    def both(wanted: slice) -> Tensor:
        with torch.no_grad():
            base = rows(wanted)
            return base + layer.get_delta_weight(adapter)[wanted].to(base.dtype)

    return both


def write_network(place: Path, parts: Mapping[str, streamed.Part]) -> None:
    """Write the weights of a network into a folder as diffusers does, in files of ``SHARD`` bytes at most: one alone,
    or several and an index. All ranks do so together.

    Raises:
        StorageError: they cannot be written.
    """
    groups: list[dict[str, streamed.Part]] = [{}]
    for name, one in parts.items():
        if groups[-1] and sum(held.size for held in groups[-1].values()) + one.size > SHARD:
            groups.append({})
        groups[-1][name] = one
    (one_file, index_file), count = _names(), len(groups)
    stem, end = one_file.rsplit(".", 1)
    named = {f"{stem}-{i:05}-of-{count:05}.{end}": group for i, group in enumerate(groups, 1)}
    for file, group in ({one_file: groups[0]} if count == 1 else named).items():
        streamed.write(place / file, group, {"format": "pt"})
    if count > 1:
        total = sum(one.size for one in parts.values())
        held = {name: file for file, group in named.items() for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": held}
        storage.write(place / index_file, json.dumps(index, indent=2))
