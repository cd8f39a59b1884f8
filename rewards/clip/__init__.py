"""The towers of CLIP rewards, their names and their preprocessing."""
