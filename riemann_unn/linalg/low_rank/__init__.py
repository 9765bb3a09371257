"""Low-rank factors: Gaussian expectations of activations, and what keeps a layer's function."""
