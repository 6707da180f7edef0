"""One volume through one network: read, tile, run, stitch, write, in bounded memory."""
