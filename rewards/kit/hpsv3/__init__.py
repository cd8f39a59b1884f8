"""The kit ``hpsv3`` of ``rlfusion.rewards.kit``."""
