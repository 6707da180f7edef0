"""Image pipelines of diffusers with their VAE in an engine of fvae: `fvae_deploy.accelerate`."""
