"""Decoder-only language models: graphs drawn node by node from a family's description, weights streamed into place."""
