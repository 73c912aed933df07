"""How good the pocket models are: `python -m benchmarks.pocket`."""
