"""How weights are trained and kept: optimisers, averages, checkpoints, the loop, the logs."""
