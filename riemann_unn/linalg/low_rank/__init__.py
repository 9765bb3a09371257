"""Low-rank factors: Gaussian expectations of activations, and factors that preserve a layer."""
