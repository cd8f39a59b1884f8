"""The draws of supervised training: a step is a pure function of its number and its key."""

import numpy as np
import torch

from rlfusion.common.seeding import Key, stream
from rlfusion.data import Dataset, batch_indices
from rlfusion.data.augment import Augment
from rlfusion.diffusion.space import Pixels, Space
from rlfusion.pretrain.base import Draw


class Draws:
    """Draws ``batch`` samples of ``data`` a step, epoch by epoch; each loses its label with probability ``dropout``.

    Attributes:
        augment: what is done to the samples, or None.
        space: where augmented samples are brought.
    """

    def __init__(self, data: Dataset, batch: int, dropout: float, total: int, device: torch.device, *key: Key) -> None:
        """``total`` is the steps of the training, ``key`` = (seed, purpose)."""
        self.x, self.label, self.no_class = data.x.to(device), data.label.to(device), data.classes
        self.batch, self.dropout, self.total, self.key = batch, dropout, total, key
        self.augment: Augment | None = None
        self.space: Space = Pixels()

    def __call__(self, step: int) -> Draw:
        """The draw of step number ``step``."""
        size, key = self.batch, (*self.key, step)
        random = stream(*key)
        index = torch.from_numpy(batch_indices(len(self.x), size, step, *self.key)).to(self.x.device)
        dropped = torch.from_numpy(random.random(size) < self.dropout).to(self.x.device)
        u = torch.from_numpy((random.permutation(size) + random.random(size)) / size)
        x0 = self.x[index]
        if self.augment is not None:
            x0 = self.space.encode(self.augment(x0, stream(*key, "augment")))
        eps = torch.from_numpy(random.standard_normal(x0.shape, dtype=np.float32)).to(self.x.device)
        cond = self.label[index].masked_fill(dropped, self.no_class)
        return Draw(x0, cond, eps, u, step, self.total, key, self.x, self.label, self.no_class, index)
