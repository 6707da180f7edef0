"""Files that outlive a run: latent stores, partial outputs for --resume, locks, fingerprints."""
