"""Statistics of what a model's layers read and of what flows back to them, gathered from text with one block of weights in memory at a time."""
