"""Kernels for the CPU in numba, and the threads and the compiler's cache that they share."""
