"""Time, memory and growth of steps, starts and whole runs: `python -m benchmarks.speed`."""
