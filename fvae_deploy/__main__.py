"""`python -m fvae_deploy`: the command line."""

from fvae_deploy.cli.main import main

main()
