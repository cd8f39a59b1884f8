"""``rlfusion launch`` and ``rlfusion jobs``: runs as jobs of a Ray cluster, through Ray Jobs."""
