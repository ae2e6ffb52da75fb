"""Graphs of models that no description builds: traced by torch from an empty model, then given the scheme's weights."""
