"""Trainers of the pocket weights: one module each, one loop for all."""
