"""Reconstruction errors in HU, as numbers and as a picture."""
