"""Make the networks of the triplane stage from nothing: `python -m stages.pocket.train triplane`, in three phases.

    fit     one decoder for all objects, then each object's planes, at points (bank.py, fit.py)
    base    the diffusion of 32^2 planes under a CLIP's embedding (diffusion.py)
    up      the diffusion from 32^2 to 64^2 planes, with a loss on renderings, and the export (diffusion.py)
Each resumes where it stopped; a phase that has been finished is left as it is.
"""
