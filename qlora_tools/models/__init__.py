"""What is known about model families, as data: one JSON per ``model_type`` in ``families/``."""
