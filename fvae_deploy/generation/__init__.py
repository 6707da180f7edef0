"""CT volumes drawn by a latent diffusion model from an organ mask and findings in words."""
