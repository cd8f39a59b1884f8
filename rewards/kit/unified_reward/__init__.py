"""The kit ``unified_reward`` of ``rlfusion.rewards.kit``."""
