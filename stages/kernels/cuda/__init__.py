"""Kernels for CUDA in Warp, and the launch that they share; only these modules import warp."""
