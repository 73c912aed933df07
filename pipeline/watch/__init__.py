"""How somebody in another process looks at a stage while it is optimised, and what they may ask of the run."""
