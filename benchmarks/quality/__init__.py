"""Systems against each other on the same prompts and seeds: `python -m benchmarks.quality`."""
