"""How good a model still is: perplexity, divergence from a reference, intervals, retention.

Everything here works on callables that turn token ids into logits, so it serves a torch model, an ONNX
session and a test's closure alike. It opens no checkpoint and knows no runtime.
"""
