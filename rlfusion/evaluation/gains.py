"""How far a reward has come."""

LEAST = 1e-12


def gain(reward: float, base: float, spread: float) -> float:
    """(reward - the base model's mean reward) / the standard deviation ``spread`` of the base's rewards."""
    return (reward - base) / max(spread, LEAST)
