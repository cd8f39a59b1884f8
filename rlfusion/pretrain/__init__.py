"""Supervised training of denoisers: objectives, presets and the learner."""

from rlfusion.pretrain.base import Draw, Loss
from rlfusion.pretrain.draws import Draws
from rlfusion.pretrain.learner import Config, Learner, noisy_labels
from rlfusion.pretrain.loss_learner import LossLearner
from rlfusion.pretrain.losses import LOSSES, PRESETS

__all__ = ["LOSSES", "PRESETS", "Config", "Draw", "Draws", "Learner", "Loss", "LossLearner", "noisy_labels"]
