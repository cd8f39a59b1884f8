"""The only home of open_clip: image and text towers with their weights, by name, hub id, folder or file.

    model                  checkpoint               what is loaded
    an architecture        one of open_clip's tags  the weights published for it, from the cache or the network
                           hf-hub:OWNER/REPO/FILE   that file, from the cache or the network
                           a path                   that file
    hf-hub:OWNER/REPO      -                        the architecture and weights of an open_clip repository
    a folder               -                        the same in a folder: open_clip_config.json beside the weights

A file of weights is a ``.safetensors``, or a torch file that holds nothing but tensors: no pickle is ever run. It may
also be of a CLIPModel of transformers (as PickScore's is), whose tensors have other names. What cannot be loaded is an
error: no tower is ever left with random weights.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common import hub, storage
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.weights import pack, sha256
from rlfusion.rewards.clip.checkpoints import HUB, local_file, read_tensors, short
from rlfusion.rewards.clip.names import is_transformers, renamed
from rlfusion.rewards.clip.preprocessing import Preprocess
from rlfusion.rewards.clip.texts import fill_all

DESCRIPTION, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
TEXTS = 256
"""Texts that are encoded at a time."""
NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
"""The text tower that a blank is built with, and thrown away with."""


@dataclass(frozen=True)
class Opened:
    """A CLIP that is not trained any more.

    Attributes:
        visual: (B, 3, *size) -> (B, width).
        preprocess: from pixels to what ``visual`` reads.
        architecture: plain data of which ``blank`` builds the same ``visual`` and ``preprocess``.
        width: numbers in an embedding.
        logit_scale: what the cosine was multiplied by in training.
        encode: texts to unit vectors (P, width); None in a blank.
    """

    visual: nn.Module
    preprocess: Preprocess
    architecture: dict[str, Any]
    width: int
    logit_scale: float
    encode: Callable[[Sequence[str]], Tensor] | None

    def table(self, templates: str | Sequence[str], prompts: Sequence[str]) -> Tensor:
        """One unit vector a prompt, (P, width): the mean over the templates of the texts' (Radford et al. 2021, 3.1.4).

        A blank answers other unit vectors, to be replaced by those of a state dict.
        """
        texts = fill_all(templates, prompts)
        if self.encode is None:
            return self.some(len(prompts))
        return nn.functional.normalize(torch.stack([self.encode(of_one) for of_one in texts]).mean(0), dim=-1)

    def some(self, count: int) -> Tensor:
        """Unit vectors (count, width), always the same."""
        random = torch.randn(count, self.width, generator=torch.Generator().manual_seed(0))
        return nn.functional.normalize(random, dim=-1)


def load(model: str, checkpoint: str = "") -> Opened:
    """The CLIP that ``model`` and ``checkpoint`` name (see the table above), frozen and in eval mode.

    Raises:
        ConfigError: nothing has that name; the weights are not here and cannot be fetched (what to provide is said),
            cannot be read without running a pickle, are damaged, or are of another architecture.
    """
    name, file = _place(model, checkpoint)
    tag = "" if file or ":" in name else checkpoint
    what = f"model = {model!r}, checkpoint = {checkpoint!r}"
    clip = _created(name, tag, file, what).eval().requires_grad_(False)
    config = _open_clip().get_model_config(name)
    preprocess = Preprocess.of(_open_clip().get_model_preprocess_cfg(clip))
    return _opened(clip, config, preprocess, _encoder(clip, _tokenizer(name, config, what)))


def blank(architecture: Mapping[str, Any]) -> Opened:
    """The image tower of ``Opened.architecture``, with random weights that a state dict is to replace."""
    tower = build({**architecture["model"], "text_cfg": NO_TEXT}, seed=0)
    preprocess = Preprocess.of(architecture["preprocess"])
    return _opened(tower.eval().requires_grad_(False), architecture["model"], preprocess, None)


def build(config: Mapping[str, Any], seed: int) -> nn.Module:
    """An open_clip CLIP of a configuration (``model_cfg``) with initial weights keyed by ``seed``.

    Raises:
        ConfigError: a configuration that open_clip cannot build.
    """
    names, library = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu"), _open_clip()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return library.CLIP(**{name: config[name] for name in names if name in config})
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"open_clip cannot build {dict(config)}: {error}") from error


def save(folder: Path, clip: nn.Module, config: Mapping[str, Any], preprocess: Mapping[str, Any]) -> None:
    """Write a folder that ``load``, and open_clip itself as ``local-dir:``, reads; each file appears whole or not."""
    storage.make_folder(folder)
    blob = pack(clip.state_dict())
    about = {"model_cfg": dict(config), "preprocess_cfg": dict(preprocess), "sha256": sha256(blob)}
    for name, content in ((WEIGHTS, blob), (DESCRIPTION, json.dumps(about, indent=1).encode())):
        storage.write(folder / name, content)


def tokenizer(context_length: int) -> Callable[[Sequence[str]], Tensor]:
    """open_clip's own tokenizer, whose vocabulary comes with it: texts -> (P, context_length) int64."""
    return _open_clip().SimpleTokenizer(context_length=context_length)


def _open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"CLIP rewards need open_clip ({error}): pip install 'rlfusion[clip]'") from error
    return open_clip


def _place(model: str, checkpoint: str) -> tuple[str, Path | None]:
    """The name by which open_clip knows the architecture, and the file of its weights where we read it ourselves."""
    if model.startswith(HUB) or Path(model).is_dir():
        if checkpoint:
            raise ConfigError(f"checkpoint = {checkpoint!r}: model = {model!r} comes with its weights, expected none")
        return (model, None) if model.startswith(HUB) else _folder(Path(model))
    library, name = _open_clip(), model.replace("/", "-")
    if name not in library.list_models():
        raise ConfigError(
            f"{unknown('open_clip architecture', model, library.list_models())} (or a folder, or {HUB}...)"
        )
    tags = library.list_pretrained_tags_by_model(name)
    if checkpoint in tags:
        return name, None
    if not checkpoint or not (checkpoint.startswith(HUB) or Path(checkpoint).is_file()):
        raise ConfigError(
            f"checkpoint = {checkpoint!r}: expected the path of a file with the weights of {model}, "
            f"{HUB}OWNER/REPO/FILE, or one of {', '.join(tags)}"
        )
    return name, local_file(checkpoint, f"checkpoint = {checkpoint!r}")


def _folder(path: Path) -> tuple[str, Path]:
    """A folder of open_clip's, or the run of ``train-clip`` that holds one."""
    for folder in (path, path / "clip"):
        if (folder / DESCRIPTION).is_file():
            break
    else:
        raise ConfigError(f"model = {str(path)!r}: expected a folder with {DESCRIPTION}, or a run of train-clip")
    file = folder / WEIGHTS
    if not file.is_file():
        found = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        if len(found) != 1:
            raise ConfigError(f"model = {str(path)!r}: expected {WEIGHTS}, or one other file of weights, in {folder}")
        file = found[0]
    try:
        stated = json.loads((folder / DESCRIPTION).read_text()).get("sha256")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{str(folder / DESCRIPTION)!r} cannot be read: {error}") from error
    if stated is None and folder != path:
        raise ConfigError(f"{str(folder / DESCRIPTION)!r} states no SHA-256 of its weights: expected it as saved")
    if stated is not None and sha256(file.read_bytes()) != stated:
        raise ConfigError(f"weights {str(file)!r} are damaged: they do not match the SHA-256 in {DESCRIPTION}")
    return f"local-dir:{folder}", file


def _created(name: str, tag: str, file: Path | None, what: str) -> nn.Module:
    """The whole CLIP with its weights: those of ``file``, or of what open_clip itself knows under the name."""
    try:
        if file is None:
            with hub.fetching(), _quiet():
                return _open_clip().create_model(name, tag or None, require_pretrained=True)
        with _quiet():
            clip = _open_clip().create_model(name, load_weights=False, pretrained_text=False)
            _load(clip, file, what)
            return clip
    except ConfigError:
        raise
    except Exception as error:  # of many libraries below open_clip
        why = short(error) if file else hub.failed(error)
        raise ConfigError(
            f"{what}: cannot be loaded: {why}; expected a network, or a file or folder of the weights"
        ) from error


def _load(clip: nn.Module, file: Path, what: str) -> None:
    state = read_tensors(file, what)
    try:
        if is_transformers(state):
            clip.load_state_dict(renamed(state))
        elif state.keys() == clip.state_dict().keys():
            clip.load_state_dict(state)
        else:  # of another version of open_clip, or of one of the other libraries that it knows
            _open_clip().load_checkpoint(clip, str(file))
    except RuntimeError as error:
        raise ConfigError(f"{what}: {str(file)!r} is of another architecture ({short(error)})") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context open_clip's log is silent, and an activation that is not the weights' own is an error."""
    root = logging.getLogger()
    held = list(root.handlers)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(logging.NOTSET)
        root.handlers[:] = held  # by ``logging.info`` open_clip gives the root logger one, in a form of its own


def _tokenizer(name: str, config: Mapping[str, Any], what: str) -> Callable[[Sequence[str]], Tensor]:
    """That of a CLIP of this configuration: the hub's own, or that of transformers which an architecture names; else
    it comes with open_clip or lies in the folder.
    """
    named = not name.startswith("local-dir:") and bool(config["text_cfg"].get("hf_tokenizer_name"))
    asks = name.startswith(HUB) or named
    try:
        with hub.fetching() if asks else nullcontext(), _quiet():
            return _open_clip().get_tokenizer(name)
    except Exception as error:  # of many libraries below open_clip
        raise ConfigError(f"{what}: no tokenizer ({short(error)})") from error


def _encoder(clip: nn.Module, tokenize: Callable[[Sequence[str]], Tensor]) -> Callable[[Sequence[str]], Tensor]:
    """Texts to unit vectors, by the text tower."""

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        tokens = tokenize(list(texts))
        full = int((tokens[:, -1] != 0).sum())
        if full:
            read = tokens.shape[1]
            warnings.warn(f"{full} of {len(texts)} texts fill the {read} tokens that this CLIP reads", stacklevel=2)
        parts = [clip.encode_text(part, normalize=True) for part in tokens.split(TEXTS)]
        return torch.cat(parts)

    return encode


def _opened(
    clip: nn.Module,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    encode: Callable[[Sequence[str]], Tensor] | None,
) -> Opened:
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    model = {"embed_dim": config["embed_dim"], "vision_cfg": vision, "quick_gelu": config.get("quick_gelu", False)}
    described = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(preprocess).items()}
    architecture = {"model": model, "preprocess": described}
    scale = float(clip.logit_scale.detach().exp())
    return Opened(clip.visual, preprocess, architecture, config["embed_dim"], scale, encode)
