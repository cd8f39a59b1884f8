"""Adapters that exist: files of LoRA in diffusers', peft's or kohya's layout, merged into a pipeline.

diffusers' own loader converts them. Here is only what it leaves open: which layout a file has, what it would leave out
without a word (DoRA's magnitudes, LoHa, weights of whole layers), which of its layers the network has, and that text
encoders are adapted before prompts are encoded.

What a card keeps of each in ``about["adapters"]`` is the folder of adapters that were trained here, or ``Adapter`` as a
mapping: ``file``, ``scale``, ``sha256``.
"""

import functools
import hashlib
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten
from rlfusion.common.hollow import Filling
from rlfusion.common.notices import say_once
from rlfusion.models import lora
from rlfusion.models.pipelines import hub, hub_adapters
from rlfusion.models.pipelines.family import Family
from rlfusion.models.pipelines.hollow import merged

LORA = "pytorch_lora_weights.safetensors"
"""How diffusers calls a file of adapters."""
PEFT, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""How peft calls one, and the file of its settings, without which its strength is not known."""
TENSOR = re.compile(
    r"[._](lora_[AB](\.\w+)?\.(weight|bias)|lora[._](down|up)\.weight|lora_linear_layer\.(down|up)\.weight)$|\.alpha$"
)
"""The tensors of low-rank adapters in every layout."""
FIRST = re.compile(r"[._](lora_A(\.\w+)?|lora[._]down|lora_linear_layer\.down)\.weight$")
"""Of each adapted layer, the one that reads its input."""
TEXTS = re.compile(r"text_encoder(_\d+)?\.|lora_te\d*_")
"""What the names of adapters of text encoders begin with."""
WRAPPED = "base_model.model."
"""What names in peft's own layout begin with."""
FAULTS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError)
"""What the libraries raise of adapters that are no adapters of this network."""


class Adapter(NamedTuple):
    """Adapters in a file, or in a folder of peft or diffusers: where, times what, and the digest of what is read."""

    file: str
    scale: float
    sha256: str


Held = str | Mapping[str, Any]
"""Adapters as a card keeps them."""


def parse(text: str) -> list[Adapter]:
    """The adapters that ``a.safetensors[:0.8],...`` names.

    Raises:
        ConfigError: one is not there, is none, or has a strength that is no number.
    """
    return [_parsed(one.strip()) for one in text.split(",")] if text.strip() else []


def _parsed(text: str) -> Adapter:
    place, scale = text, 1.0
    if not Path(text).expanduser().exists() and ":" in text:
        place, _, told = text.rpartition(":")
        try:
            scale = float(told)
        except ValueError:
            scale = math.nan
            if hub_adapters.is_named(text):
                place, scale = text, 1.0
        if not math.isfinite(scale) or not scale:
            raise ConfigError(
                f"adapters = {shorten(repr(text))}: expected FILE:STRENGTH, a finite number, not 0, or "
                "OWNER/NAME[:FILE][@REVISION][:STRENGTH] of the hub"
            )
    found = located(place)
    return Adapter(str(found), scale, digest(found))


def located(text: str) -> Path:
    """The whole path of a file of adapters, here or on the hub, or of the folder whose settings belong to it.

    Raises:
        ConfigError: there is none, or it is no file of adapters.
    """
    path = Path(text).expanduser().absolute()
    if not path.exists() and hub_adapters.is_named(text):
        path = hub_adapters.fetched(text, (LORA, PEFT), SETTINGS)
    if path.name == PEFT and (path.parent / SETTINGS).is_file():
        path = path.parent
    file = weights(path)
    if not file.exists():
        raise ConfigError(
            f"adapters = {shorten(repr(text), LONGEST_PATH)}: there is no {file.name}, expected a .safetensors file, "
            f"a folder with {LORA} or {PEFT}, or OWNER/NAME of the hub"
        )
    _names(file)
    return path


def weights(path: Path) -> Path:
    """The file of the weights of adapters in a folder, or of a file."""
    if not path.is_dir():
        return path
    return path / PEFT if (path / PEFT).is_file() else path / LORA


def digest(path: Path) -> str:
    """SHA-256 of what is read of adapters: the weights, and beside peft's their settings."""
    file = weights(path)
    held, beside = hashlib.sha256(file.read_bytes()), file.with_name(SETTINGS)
    if file.name == PEFT and beside.is_file():
        held.update(beside.read_bytes())
    return held.hexdigest()


def is_lora(path: Path) -> bool:
    """Whether a path is that of adapters, a file or a folder."""
    file = weights(path)
    if file.suffix != ".safetensors" or not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as held:
            return any(FIRST.search(name) for name in held.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return False


def _names(file: Path) -> list[str]:
    """The names of the tensors in a file of adapters.

    Raises:
        ConfigError: it is no such file, or holds what would be left out.
    """
    said = f"adapters {shorten(repr(str(file)), LONGEST_PATH)}"
    if file.suffix != ".safetensors":
        raise ConfigError(f"{said}: only .safetensors are read, expected adapters in that format")
    try:
        with safe_open(file, "pt") as held:
            names = list(held.keys())
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{said} cannot be read: {error}") from error
    if not any(FIRST.search(name) for name in names):
        raise ConfigError(f"{said}: it holds no adapters, expected tensors named lora_A, lora_down or lora.down")
    if other := [name for name in names if not TENSOR.search(name)]:
        raise ConfigError(
            f"{said}: {len(other)} of its tensors are no part of a LoRA ({shorten(other[0], 80)}) and would be left "
            "out, expected low-rank factors and their alpha alone (no DoRA, LoHa, LoKr, or weights of whole layers)"
        )
    return names


def of(held: Held) -> Adapter:
    """Adapters that a card keeps, as they were.

    Raises:
        ConfigError: the file is not there, or another.
    """
    one = Adapter(held, 1.0, "") if isinstance(held, str) else Adapter(**held)
    path = Path(one.file)
    if one.sha256 and (not weights(path).is_file() or digest(path) != one.sha256):
        raise ConfigError(
            f"adapters {shorten(repr(one.file), LONGEST_PATH)} are gone, or others than the model was made with "
            f"(SHA-256 {one.sha256[:12]}): put them back"
        )
    return one


def on_texts(held: Sequence[Held]) -> list[Held]:
    """Those that adapt text encoders as well."""
    files = [one for one in held if not isinstance(one, str)]
    return [one for one in files if any(map(TEXTS.match, _names(weights(Path(of(one).file)))))]


def adapted(pipe: Any, held: Sequence[Held], family: Family) -> Any:
    """The pipeline with the adapters of a card merged into the weights of its network.

    Raises:
        ConfigError: there are none, or none that fit.
    """
    for one in held:
        put_on(pipe, one, family)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        getattr(pipe, family.network).requires_grad_()  # which peft has frozen
    return pipe


def adapted_texts(pipe: Any, held: Sequence[Held], family: Family) -> Any:
    """The pipeline with those that are of text encoders merged into them.

    Raises:
        ConfigError: as ``adapted``; or the pipeline has no such text encoder.
    """
    for one in on_texts(held):
        adapter = of(one)
        with _part(adapter, family, texts=True) as folder:
            _load(pipe, folder, adapter, None)
        names = [name for name in pipe._lora_loadable_modules if name.startswith("text_encoder")]
        encoders = {name: part for name in names if (part := pipe.components.get(name)) is not None}
        layers = [layer for part in encoders.values() for _, layer in lora.layers_of(part)]
        _require_some(adapter, layers, "text encoders")
        _strengthen(layers, adapter.scale)
        pipe.fuse_lora(components=list(encoders))
        pipe.unload_lora_weights()
    return pipe


def put_on(pipe: Any, held: Held, family: Family, name: str | None = None) -> None:
    """Give the network of a pipeline adapters of a card, under a ``name`` where one is told.

    Raises:
        ConfigError: there are none, or none that fit.
    """
    adapter = of(held)
    if isinstance(held, str):
        _load(pipe, Path(adapter.file), adapter, name)
        return
    if not family.adaptable:
        raise ConfigError(
            f"adapters {shorten(repr(adapter.file), LONGEST_PATH)}: diffusers has no adapters (LoRA) for "
            f"{type(pipe).__name__}, expected none"
        )
    model = getattr(pipe, family.network)
    with _part(adapter, family, texts=False) as folder, _handed(model, family.network) as handed:
        _load(pipe, folder, adapter, name)
    layers = dict(lora.layers_of(model))
    _require_some(adapter, list(layers.values()), f"the {family.network}")
    _report(adapter, family.network, handed, layers)
    _strengthen(list(layers.values()), adapter.scale)


def _load(pipe: Any, folder: Path, adapter: Adapter, name: str | None) -> None:
    try:
        with lora.without_bitsandbytes():
            pipe.load_lora_weights(str(folder), weight_name=LORA, adapter_name=name)
    except FAULTS as error:
        raise ConfigError(
            f"adapters {shorten(repr(str(weights(Path(adapter.file)))), LONGEST_PATH)} cannot be loaded into "
            f"{type(pipe).__name__}: {shorten(' '.join(str(error).split()), 200)}"
        ) from error


def _require_some(adapter: Adapter, layers: Sequence[nn.Module], what: str) -> None:
    if not layers:
        raise ConfigError(
            f"adapters {shorten(repr(adapter.file), LONGEST_PATH)}: none of their layers is one of {what}, expected "
            "adapters that were trained on this model"
        )


def _strengthen(layers: Sequence[Any], scale: float) -> None:
    """Multiply what layers have of adapters."""
    for layer in layers:
        for name in layer.active_adapters:
            layer.scaling[name] *= scale


@contextmanager
def _part(adapter: Adapter, family: Family, texts: bool) -> Iterator[Path]:
    """A folder with the part of a file that is of text encoders, or of the network, in a layout that diffusers reads.

    Raises:
        ConfigError: there is no such part, or peft's settings are lacking.
    """
    file = weights(Path(adapter.file))
    tensors = {n: t for n, t in safetensors.torch.load_file(file).items() if bool(TEXTS.match(n)) == texts}
    if not tensors:
        raise ConfigError(f"adapters {adapter.file!r}: they are of text encoders alone, expected some of the network")
    with safe_open(file, "pt") as held:
        metadata = dict(held.metadata() or {})
    if texts:
        tensors = _of_own_strength(tensors)
    if all(name.startswith(WRAPPED) for name in tensors):
        tensors = {f"{family.network}.{name.removeprefix(WRAPPED)}": tensor for name, tensor in tensors.items()}
        metadata = {"lora_adapter_metadata": json.dumps(_peft_settings(file, family.network))}
    with tempfile.TemporaryDirectory() as place:
        safetensors.torch.save_file(tensors, Path(place) / LORA, {**metadata, "format": "pt"})
        yield Path(place)


def _of_own_strength(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """kohya's adapters with alpha / rank in their second factor, which diffusers loses on its way to text encoders."""
    held = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    for name in tensors.keys() - held.keys():
        stem = name.removesuffix(".alpha")
        up, rank = f"{stem}.lora_up.weight", len(held[f"{stem}.lora_down.weight"])
        held[up] = held[up] * (tensors[name].to(held[up]) / rank)
    return held


def _peft_settings(file: Path, network: str) -> dict[str, Any]:
    """What peft says of adapters, as diffusers keeps it."""
    from peft import LoraConfig

    try:
        held = json.loads(file.with_name(SETTINGS).read_text())
        known = LoraConfig(**{k: v for k, v in held.items() if k in LoraConfig.__dataclass_fields__}).to_dict()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"adapters {shorten(repr(str(file)), LONGEST_PATH)} are in peft's layout, and {SETTINGS} beside them, "
            f"which has their strength, cannot be read: {error}"
        ) from error
    known = {name: sorted(value) if isinstance(value, set) else value for name, value in known.items()}
    return {f"{network}.{name}": value for name, value in known.items()}


@contextmanager
def _handed(model: Any, network: str) -> Iterator[dict[str, Any]]:
    """Within the context, what diffusers' loader hands the network, by the names that it has converted."""
    seen: dict[str, Any] = {}
    own = model.load_lora_adapter

    def noting(state: dict[str, Any], *args: Any, **settings: Any) -> Any:
        prefix = settings.get("prefix", network)
        lead = f"{prefix}." if prefix else ""
        seen.update({name.removeprefix(lead): tensor for name, tensor in state.items() if name.startswith(lead)})
        return own(state, *args, **settings)

    model.load_lora_adapter = noting
    try:
        yield seen
    finally:
        del model.load_lora_adapter


def _report(adapter: Adapter, network: str, handed: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
    """Say how many layers were matched, and which were not."""
    state = dict(handed)
    if state and "lora_A" not in next(iter(state)):
        state = hub.diffusers().utils.convert_unet_state_dict_to_peft(state)
    asked = list(dict.fromkeys(FIRST.sub("", name) for name in state if FIRST.search(name)))
    missing = [name for name in asked if name not in layers]
    text = f"adapters {adapter.file!r}, times {adapter.scale:g}: {len(asked) - len(missing)} of {len(asked)} layers "
    text += f"matched in the {network}"
    if missing:
        text += f"; it has no {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    say_once(text)


def merged_all(pipe: Any, model: nn.Module, filling: Filling, held: Sequence[Held], family: Family) -> Filling:
    """Where the rows of the network of a pipeline are with the adapters of a card merged into its weights.

    Raises:
        ConfigError: as ``adapted``.
    """
    for one in held:
        put: Callable[[], None] = functools.partial(put_on, pipe, one, family)
        filling = merged(model, filling, put)
        pipe.unload_lora_weights()
        model.requires_grad_()
    return filling
