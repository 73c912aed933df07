"""Coloured point clouds by diffusion, and a surface around them: Point-E (arXiv 2212.08751) in the small."""
