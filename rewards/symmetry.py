"""symmetry(x) = -mean over channels and pixels of |x - mirror(x)|, mirror swapping left and right. Differentiable."""

from torch import Tensor

from rlfusion.common.tensors import Cond, mean_features


def symmetry(samples: Tensor, cond: Cond) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B,) in [-1, 0], 0 for a mirror image of itself; the condition is not used."""
    return -mean_features((samples - samples.flip(-1)).abs())
