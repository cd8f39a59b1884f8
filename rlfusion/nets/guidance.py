"""A network that reads the guidance weight w (Meng et al. 2023, section 3.1; Luo et al. 2023, section 4.3).

    (1)  e = E(label) + W2 silu(W1 f(w)),     f sines and cosines of w, W2 = 0 at first

in the place of a network's embedding of classes, as captions are: a network begins as it was without, at every w.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from rlfusion.nets.parts import fourier, zeroed

LARGEST = 10.0
"""The largest frequency of f: guidance is smooth in w."""


class Guidance(nn.Module):
    """``embed({"label": ..., "w": (B,)})`` -> (B, width), around the embedding ``label`` of the label alone."""

    def __init__(self, label: nn.Module, width: int, features: int = 64) -> None:
        super().__init__()
        self.label, self.features = label, features
        self.weight = nn.Sequential(nn.Linear(features, width), nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, cond: dict[str, Tensor]) -> Tensor:
        embedding = self.label(cond["label"])
        return embedding + self.weight(fourier(cond["w"], self.features, LARGEST).to(embedding))

    def set(self, captions: Sequence[str]) -> None:
        """Replace the table of captions, where the label is one (``nets.captions``)."""
        self.label.set(captions)
