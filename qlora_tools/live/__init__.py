"""Checkpoints as torch models that run: layers that keep their stored form, and the texts that are put through them."""
