"""Files of weights that others publish: tensors by name, read without running a pickle."""

from pathlib import Path

import torch
from torch import Tensor

from rlfusion.common import hub
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import unpack

HUB = "hf-hub:"


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The named tensors in a file of weights.

    Raises:
        ConfigError: no such file, one that cannot be read, or that holds other things than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return unpack(path.read_bytes())
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many for a file that it will not read
        raise ConfigError(
            f"{what}: {str(path)!r} cannot be read ({short(error)}); expected a .safetensors, or a torch file that "
            "holds nothing but tensors"
        ) from error
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ConfigError(f"{what}: {str(path)!r} holds {type(held).__name__}: expected named tensors")
    return {name.removeprefix("module."): tensor for name, tensor in held.items()}


def local_file(text: str, what: str) -> Path:
    """The file that ``text``, a path or hf-hub:OWNER/REPO/FILE, names; one of a hub is fetched unless it is here.

    Raises:
        ConfigError: no such file, or no network.
    """
    if not text.startswith(HUB):
        if not Path(text).is_file():
            raise ConfigError(f"{what}: {text!r} is no file")
        return Path(text)
    import huggingface_hub

    owner, _, rest = text.removeprefix(HUB).partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise ConfigError(f"{what}: expected hf-hub:OWNER/REPO/FILE, got {text!r}")
    try:
        with hub.fetching():
            return Path(huggingface_hub.hf_hub_download(f"{owner}/{repo}", file))
    except Exception as error:  # of many libraries below it
        raise ConfigError(
            f"{what}: {text!r} cannot be fetched: {hub.failed(error)}; expected a network, or the path of {file} in "
            "its place"
        ) from error


def short(error: BaseException) -> str:
    """An error of another library, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
