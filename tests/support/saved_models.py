"""Cards of small models of every network, and models whose every weight matters."""

import torch

from rlfusion import models
from rlfusion.models import Card, Config

CARDS = [
    Card(Config("ResidualMLP(width=16, depth=1)", "Cosine()", "x0"), (1, 8, 8), ("a", "b", "c")),
    Card(Config("ResidualMLP(width=8, depth=2)", "DDPM(resolution=50)", "eps"), (3, 4, 4), ("all",)),
    Card(Config("UNet(width=16)", "Rectified()", "flow"), (1, 8, 8), ("0", "1")),
    Card(Config("DiT(width=16, depth=1, heads=2)", "Rectified()", "flow"), (1, 8, 8), ("0", "1")),
]

CARD = CARDS[0]


def scrambled(card: Card, seed: int = 1) -> torch.nn.Module:
    """A denoiser whose every weight matters to its output."""
    denoiser = models.build(card)
    torch.manual_seed(seed)
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return denoiser
