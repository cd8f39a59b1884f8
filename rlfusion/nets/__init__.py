"""Networks: the embedded default, and classifiers that judge."""
