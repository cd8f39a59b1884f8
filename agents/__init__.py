"""One algorithm a file: its settings, its learner, and what it needs of the chain."""
