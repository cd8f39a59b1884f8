"""Rewards: one file each; ``build`` makes one by name, ``score`` checks what it answers."""

from rlfusion.rewards.base import Learned, Reward, RewardError, RewardFailure, score, valid
from rlfusion.rewards.class_logprob import ClassLogProb
from rlfusion.rewards.grouped import GroupWise, PairWise, needs_groups
from rlfusion.rewards.ink import ink
from rlfusion.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from rlfusion.rewards.registry import REWARDS, asks, build, everywhere, find, labels, names_of, require_named, task_info
from rlfusion.rewards.remote.client import Remote
from rlfusion.rewards.symmetry import symmetry
from rlfusion.rewards.weighted import WeightedSum
from rlfusion.rewards.wrapped import CallOptions, bare, caches

__all__ = [
    "REWARDS",
    "CallOptions",
    "ClassLogProb",
    "GroupWise",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Learned",
    "PairWise",
    "Remote",
    "Reward",
    "RewardError",
    "RewardFailure",
    "WeightedSum",
    "asks",
    "bare",
    "build",
    "caches",
    "everywhere",
    "find",
    "ink",
    "labels",
    "names_of",
    "needs_groups",
    "require_named",
    "score",
    "symmetry",
    "task_info",
    "valid",
]
