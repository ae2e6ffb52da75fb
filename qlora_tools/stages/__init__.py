"""Stages turn specs into plans: quantize, merge, extract. Each plan is complete before a weight is read."""
