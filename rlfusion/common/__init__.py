"""Used by every package: errors, tensors, randomness, settings as text, weights as bytes."""
