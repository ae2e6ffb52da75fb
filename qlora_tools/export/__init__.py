"""Decoder graphs for ONNX Runtime, built node by node from a description, with weights streamed into place."""
