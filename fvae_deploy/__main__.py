"""`python -m fvae_deploy`: the command line."""

from fvae_deploy.cli import main

main()
