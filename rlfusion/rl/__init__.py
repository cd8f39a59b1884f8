"""Shared by the agents: advantages, transitions, value functions, guards."""
