"""The operators a decoder is spelt in: ONNX Runtime's own, which are fast there, or plain ONNX for everybody."""
