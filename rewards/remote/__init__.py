"""Rewards in another process: client, server and the frames between them."""
