"""Broken inputs in numbers: what a run makes of files that something has changed."""
