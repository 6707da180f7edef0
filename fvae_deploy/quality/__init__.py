"""Errors of a reconstruction in HU, as numbers and as a picture."""
