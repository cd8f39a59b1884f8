"""rlfusion: reward fine-tuning of diffusion models.

The denoising chain is a Markov decision process, the diffusion model is its policy, and a learner improves the
policy for a reward. See README.md for a first run and docs/design.md for the mathematics of the core.

    import rlfusion as rlf

gives the names of ``__all__``, and these are what README and docs use. Everything else in the package may change
between versions. A name is loaded when it is first touched, so that the import alone is quick.
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from sys import modules as _modules
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if not (_Path(__path__[0]) / "envs").is_dir():  # in a checkout envs/, rewards/ and agents/ stand beside this folder
    __path__.append(str(_Path(__path__[0]).parent))

_PUBLIC = {
    "rlfusion.api": "Model load sample save",
    "rlfusion.finetuning": "Run finetune",
    "rlfusion.judging": "evaluate make_env",
    "rlfusion.common.errors": "ConfigError NumericalError RlfusionError StateError StorageError UnavailableError "
    "UserCodeError",
    "rlfusion.data": "Dataset digits",
    "rlfusion.data.sources": "load:load_data",
    "rlfusion.diffusion.chain": "Chain",
    "rlfusion.diffusion.denoiser": "Denoiser",
    "rlfusion.diffusion.gaussian": "Gaussian",
    "rlfusion.diffusion.grid": "TimeGrid",
    "rlfusion.diffusion.kernel": "CPS DDIM DDPM:Ancestral FlowSDE Langevin Renoise ReverseSDE",
    "rlfusion.diffusion.policy": "Observation Policy",
    "rlfusion.diffusion.sampling": "chain_noise walk",
    "rlfusion.diffusion.schedule": "DDPM VP Cosine Geometric Karras Rectified ScaledLinear Trig ZeroSNR",
    "rlfusion.nets.dit": "DiT",
    "rlfusion.nets.mlp": "ResidualMLP",
    "rlfusion.nets.unet": "UNet",
    "rlfusion.rewards": "GroupWise PairWise Reward RewardError score",
}
"""The public names by their module; ``name:public`` where the public one is another."""

_HOMES = {
    word.rpartition(":")[2]: (module, word.partition(":")[0])
    for module, words in _PUBLIC.items()
    for word in words.split()
}

__all__ = ["__version__", *sorted(_HOMES)]

if TYPE_CHECKING:
    from rlfusion.api import Model as Model
    from rlfusion.api import load as load
    from rlfusion.api import sample as sample
    from rlfusion.api import save as save
    from rlfusion.common.errors import ConfigError as ConfigError
    from rlfusion.common.errors import NumericalError as NumericalError
    from rlfusion.common.errors import RlfusionError as RlfusionError
    from rlfusion.common.errors import StateError as StateError
    from rlfusion.common.errors import StorageError as StorageError
    from rlfusion.common.errors import UnavailableError as UnavailableError
    from rlfusion.common.errors import UserCodeError as UserCodeError
    from rlfusion.data import Dataset as Dataset
    from rlfusion.data import digits as digits
    from rlfusion.data.sources import load as load_data  # noqa: F401
    from rlfusion.diffusion.chain import Chain as Chain
    from rlfusion.diffusion.denoiser import Denoiser as Denoiser
    from rlfusion.diffusion.gaussian import Gaussian as Gaussian
    from rlfusion.diffusion.grid import TimeGrid as TimeGrid
    from rlfusion.diffusion.kernel import CPS as CPS
    from rlfusion.diffusion.kernel import DDIM as DDIM
    from rlfusion.diffusion.kernel import DDPM as Ancestral  # noqa: F401
    from rlfusion.diffusion.kernel import FlowSDE as FlowSDE
    from rlfusion.diffusion.kernel import Langevin as Langevin
    from rlfusion.diffusion.kernel import Renoise as Renoise
    from rlfusion.diffusion.kernel import ReverseSDE as ReverseSDE
    from rlfusion.diffusion.policy import Observation as Observation
    from rlfusion.diffusion.policy import Policy as Policy
    from rlfusion.diffusion.sampling import chain_noise as chain_noise
    from rlfusion.diffusion.sampling import walk as walk
    from rlfusion.diffusion.schedule import DDPM as DDPM
    from rlfusion.diffusion.schedule import VP as VP
    from rlfusion.diffusion.schedule import Cosine as Cosine
    from rlfusion.diffusion.schedule import Geometric as Geometric
    from rlfusion.diffusion.schedule import Karras as Karras
    from rlfusion.diffusion.schedule import Rectified as Rectified
    from rlfusion.diffusion.schedule import ScaledLinear as ScaledLinear
    from rlfusion.diffusion.schedule import Trig as Trig
    from rlfusion.diffusion.schedule import ZeroSNR as ZeroSNR
    from rlfusion.finetuning import Run as Run
    from rlfusion.finetuning import finetune as finetune
    from rlfusion.judging import evaluate as evaluate
    from rlfusion.judging import make_env as make_env
    from rlfusion.nets.dit import DiT as DiT
    from rlfusion.nets.mlp import ResidualMLP as ResidualMLP
    from rlfusion.nets.unet import UNet as UNet
    from rlfusion.rewards import GroupWise as GroupWise
    from rlfusion.rewards import PairWise as PairWise
    from rlfusion.rewards import Reward as Reward
    from rlfusion.rewards import RewardError as RewardError
    from rlfusion.rewards import score as score


def __getattr__(name: str) -> object:
    """A public name, loaded now."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=_modules[__name__])
    module, attribute = _HOMES[name]
    found = globals()[name] = getattr(_import_module(module), attribute)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
