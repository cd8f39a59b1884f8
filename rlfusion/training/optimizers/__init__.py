"""Optimisers by name, that keep their state by the names of the parameters.

    adamw                    torch.optim.AdamW, fused on CPU and CUDA
    sgd(momentum=0.9)        torch.optim.SGD
    adamw8bit                bitsandbytes' AdamW, with moments in 8 bits, by blocks (Dettmers et al. 2022)
    torch.optim:NAdam(...)   any other torch.optim.Optimizer: package.module:Class, path/to/file.py:Class, or an entry
                             point of the group rlfusion.optimizers

In brackets stand the arguments of the class, but for ``lr`` and ``weight_decay``, which are settings of their own.
"""

from rlfusion.training.optimizers.named import NamedOptimizer, state_bytes
from rlfusion.training.optimizers.names import OPTIMIZERS, parse, require_elementwise, settle
from rlfusion.training.optimizers.recipe import Recipe

__all__ = ["OPTIMIZERS", "NamedOptimizer", "Recipe", "parse", "require_elementwise", "settle", "state_bytes"]
