"""ink(x) = mean over channels and pixels of x: how bright an image is. Differentiable."""

from torch import Tensor

from rlfusion.common.tensors import Cond, mean_features


def ink(samples: Tensor, cond: Cond) -> Tensor:
    """(B, C, H, W) in [0, 1] -> (B,) in [0, 1]; the condition is not used."""
    return mean_features(samples)
