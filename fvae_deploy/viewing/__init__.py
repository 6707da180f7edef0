"""Volumes and latents as layers of a viewer: a reader for napari, which `napari.yaml` describes."""
