"""Meshes by a generator that only ever saw pictures: GET3D (arXiv 2209.11163) in the small."""
