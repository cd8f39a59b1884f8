"""A network of your own in one file.

    rlfusion pretrain --model.net 'examples/own_network.py:Net(width=64)'

It is made as Net(shape=(C, H, W), classes=N, ...your settings), and called as net(x, t, label): x (B, C, H, W), the
noised sample; t (B,), its time in [0, 1]; label (B,) in 0..N, N for "no class". The answer has the shape of x.
"""

import math

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two linear layers on the sample, its time and its label."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 64) -> None:
        super().__init__()
        size = math.prod(shape)
        self.enter = nn.Linear(size + 2, width)
        self.label = nn.Embedding(classes + 1, width)
        self.leave = nn.Linear(width, size)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        time = t.to(x).reshape(-1, 1).expand(len(x), 1)
        told = torch.cat([x.flatten(1), time, time.square()], 1)
        return self.leave(torch.tanh(self.enter(told) + self.label(label))).view_as(x)
