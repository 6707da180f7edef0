"""Batch mode: runs many scans or generations, through one engine or on Ray."""
