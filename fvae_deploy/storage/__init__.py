"""What lies on disk between runs: latent stores, journals for --resume, locks and fingerprints."""
