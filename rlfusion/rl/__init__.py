"""What the agents share: advantages, transitions, value functions, guards."""
