"""Many runs: a prompt and a seed each, on several workers, in a folder that can be gone on with at any moment."""
