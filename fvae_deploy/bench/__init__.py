"""Measure throughput, peak memory and error of every engine, each in a separate process."""
