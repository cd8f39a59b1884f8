"""The kit ``object_checks`` of ``rlfusion.rewards.kit``."""
