"""The denoising chain as a Gymnasium environment; importing this registers ``rlfusion/Denoising-v0``.

import gymnasium, rlfusion.envs
env = gymnasium.make("rlfusion/Denoising-v0")                        # one chain, numpy
envs = gymnasium.make_vec("rlfusion/Denoising-v0", num_envs=64)      # 64 chains in one tensor
"""

from gymnasium.envs.registration import register

from rlfusion.envs.denoising import DenoisingVectorEnv
from rlfusion.envs.single import DenoisingEnv

ENV_ID = "rlfusion/Denoising-v0"

register(
    ENV_ID,
    entry_point="rlfusion.envs.single:DenoisingEnv",
    vector_entry_point="rlfusion.envs.denoising:DenoisingVectorEnv",
)

__all__ = ["ENV_ID", "DenoisingEnv", "DenoisingVectorEnv"]
