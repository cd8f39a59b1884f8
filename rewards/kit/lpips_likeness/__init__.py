"""The kit ``lpips_likeness`` of ``rlfusion.rewards.kit``."""
