"""fvae score: sets of generated CTs compared with sets of real ones."""
