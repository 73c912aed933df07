"""Make the networks of the points stage from nothing: `python -m stages.pocket.train points`, in three phases.

    base    the diffusion of 1,024 points under a CLIP's reading of captions and pictures (trainer.py)
    up      the diffusion of three times as many more under those
    sdf     the signed distance to a cloud, and the export
The objects of all three are made first (bank.py). Each phase resumes where it stopped.
"""
