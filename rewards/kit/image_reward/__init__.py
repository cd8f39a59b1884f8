"""The kit ``image_reward`` of ``rlfusion.rewards.kit``."""
