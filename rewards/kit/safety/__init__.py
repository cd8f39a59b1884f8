"""The kit ``safety`` of ``rlfusion.rewards.kit``."""
