"""Latents to train on: a dataset for torch, and transforms of dictionaries as MONAI has them."""
