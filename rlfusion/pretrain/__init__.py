"""Supervised training of denoisers."""

from rlfusion.pretrain.denoising import Config, Learner

__all__ = ["Config", "Learner"]
