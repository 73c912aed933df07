"""Tri-planes and the diffusion that makes them from words: Rodin (arXiv 2212.06135) in the small."""
