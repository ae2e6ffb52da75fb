"""Low-rank approximation of weight differences: truncated SVD, its certificate, rank choice, factored algebra. Tensors only, no files."""
