"""Priors from diffusers folders: what a folder holds, how it is loaded, called, fitted into memory and personalised."""
