"""The kit ``deqa`` of ``rlfusion.rewards.kit``."""
