"""Every kernel against its twin and against other packages: `python -m benchmarks.kernels`."""
