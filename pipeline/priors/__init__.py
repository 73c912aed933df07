"""Priors by name: what each source means, the checks before any work, the memory they take."""
