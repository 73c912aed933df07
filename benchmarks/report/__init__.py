"""The page of a suite, pictures of it and the tables of the READMEs: `python -m benchmarks.report`."""
