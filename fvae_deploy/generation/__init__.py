"""Generate CT volumes from an organ mask and findings, with a latent diffusion model."""
