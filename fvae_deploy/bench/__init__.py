"""Throughput, peak memory and error of every engine, each measured in a process of its own."""
