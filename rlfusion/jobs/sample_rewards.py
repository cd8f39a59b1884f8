"""The reward of every sample of a run's evaluations, by which runs are compared sample by sample.

Sample i of an evaluation has the prompt i modulo their number and noise that the run's seed and i alone key, so that it
is the same sample in all runs of a seed. Kept are those of the base model and of the newest evaluation, each as
``evaluations/rewards-UPDATES.npy``: (2, N), the prompts and their rewards, NaN for one that failed.
"""

from io import BytesIO
from pathlib import Path

import numpy as np
from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError

FOLDER = "evaluations"


def keep(folder: Path, step: int, label: Tensor, reward: Tensor) -> None:
    """Keep the rewards (N,) of samples of the prompts ``label`` (N,), of the evaluation after ``step`` updates.

    Raises:
        StorageError: they cannot be written.
    """
    if not storage.writes():
        return
    written = BytesIO()
    np.save(written, np.stack([label.double().cpu().numpy(), reward.double().cpu().numpy()]), allow_pickle=False)
    file = _file(folder, step)
    storage.make_folder(file.parent)
    storage.write(file, written.getvalue())
    for other in file.parent.glob("rewards-*.npy"):
        if other not in (file, _file(folder, 0)):
            other.unlink(missing_ok=True)


def kept(folder: Path, step: int) -> np.ndarray | None:
    """What ``keep`` has written, (2, N); None where nothing is there, as of runs of older versions.

    Raises:
        ConfigError: it is damaged.
    """
    file = _file(folder, step)
    if not file.is_file():
        return None
    try:
        held = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{str(file)!r} is damaged ({error}): remove it, and the rest is compared") from error
    if held.ndim != 2 or len(held) != 2 or held.dtype != np.float64:
        raise ConfigError(f"{str(file)!r} holds {held.dtype}{held.shape}, expected float64 (2, N): remove it")
    return held


def _file(folder: Path, step: int) -> Path:
    return folder / FOLDER / f"rewards-{step}.npy"
