"""Rewards: one file each; ``build`` makes one by name, ``score`` checks what it answers."""

from rlfusion.rewards.base import Learned, Reward, RewardError, score
from rlfusion.rewards.class_logprob import ClassLogProb
from rlfusion.rewards.ink import ink
from rlfusion.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from rlfusion.rewards.registry import REWARDS, build, facts, find
from rlfusion.rewards.symmetry import symmetry
from rlfusion.rewards.weighted import WeightedSum

__all__ = [
    "REWARDS",
    "ClassLogProb",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Learned",
    "Reward",
    "RewardError",
    "WeightedSum",
    "build",
    "facts",
    "find",
    "ink",
    "score",
    "symmetry",
]
