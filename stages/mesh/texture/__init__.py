"""Texture coordinates and what is painted on them, up to the finished mesh."""
