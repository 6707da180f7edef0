"""Runs one volume through one network in bounded memory: read, tile, run, stitch, write."""
