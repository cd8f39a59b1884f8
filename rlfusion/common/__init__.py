"""What every room uses: errors, tensors, randomness, settings as text, weights as bytes."""
