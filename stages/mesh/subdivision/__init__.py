"""Loop's subdivision of a coarse control mesh, and what keeps that mesh in shape."""
