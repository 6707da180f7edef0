"""The model card of a bundle, as README.md of its repository: Markdown below YAML."""

from __future__ import annotations

import json
import re

from fvae_deploy.errors import printable
from fvae_deploy.export.bundle import Bundle
from fvae_deploy.export.generator import GeneratorManifest
from fvae_deploy.export.manifest import Manifest

# Licences by the names that a hub has for them.
LICENCES = ("apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "mit")
UNKNOWN = "not known: see the source of the weights"
VAE = """
    pip install 'fvae-deploy[hub]'
    fvae reconstruct ct.nii.gz -o recon.nii.gz --model {place}
"""
GENERATOR = """
    pip install 'fvae-deploy[hub]'
    fvae generate --mask organs.nii.gz -o made.nii.gz --model {place}
"""


def licence_of(bundle: Bundle) -> str:
    """Return the licence of a bundle's weights on one line; "" if the manifest does not know it."""
    text = " ".join(printable(bundle.licence).split())
    return "" if text.startswith(("unknown", "see ")) else text


def model_card(bundle: Bundle, place: str) -> str:
    """Return the card of a bundle that is or will be at `place`, like hf:OWNER/NAME."""
    vae = isinstance(bundle, Manifest)
    licence = licence_of(bundle)
    listed = licence.lower() in LICENCES
    lines = ["---", f"license: {licence.lower() if listed else 'other'}"]
    if not listed:
        lines.append(f"license_name: {json.dumps(licence or 'unknown')}")  # JSON is YAML
    kind = "image-feature-extraction" if vae else "image-to-image"
    lines += ["library_name: fvae", f"pipeline_tag: {kind}", "tags:"]
    lines += [f"- {tag}" for tag in ("fvae", "fvae-bundle", "onnx", "ct", "medical")]
    lines += ["---", "", f"# {_text(bundle.name)}", "", f"{_text(bundle.description)}.", ""]
    kind = "A VAE" if vae else "A generator of CT"
    lines += [
        f"{kind} as a bundle of fvae {_text(bundle.fvae_version)}: ONNX graphs, their weights in "
        "safetensors, and `manifest.json`, which lists the sha256 of every file. It contains no "
        "code. Not a medical device: a reconstruction may remove or invent structure.",
        (VAE if vae else GENERATOR).format(place=place),
        "| | |",
        "|---|---|",
        f"| licence of the weights | {_text(licence) or UNKNOWN} |",
        f"| source of the weights | {_text(bundle.source.id)} |",
        f"| revision of the source | {_text(bundle.source.revision) or 'none'} |",
        f"| sha256 of the source | {_text(bundle.source.sha256)} |",
        f"| network | {_text(bundle.network.family)} |",
    ]
    if isinstance(bundle, Manifest):
        lines += _vae(bundle)
    if isinstance(bundle, GeneratorManifest):
        lines += _generator(bundle)
    return "\n".join(lines) + "\n"


def _vae(bundle: Manifest) -> list[str]:
    g, i = bundle.geometry, bundle.intensity
    lines = [
        f"| voxels per latent cell | {g.temporal}x{g.spatial}x{g.spatial} |",
        f"| channels of latents, of pictures | {g.latent_channels}, {g.channels} |",
        f"| HU window, as model values | {i.hu_min:g} to {i.hu_max:g}, as {i.model_min:g} to "
        f"{i.model_max:g} |",
        f"| protocols | {', '.join(g.protocols)} |",
    ]
    if bundle.parity:
        lines += [
            "",
            "Errors of the engines against float32 torch, measured at export on one clip:",
            "",
            "| engine | latents, at most, standard deviations | mean, HU | at most, HU |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {_text(p.engine)} {_text(p.precision)} | {p.latent_max:.2g} | {p.hu_mean:.2g} | "
            f"{p.hu_max:.2g} |"
            for p in bundle.parity
        ]
    return lines


def _generator(bundle: GeneratorManifest) -> list[str]:
    lines = [
        f"| latents of | {_text(bundle.vae)} |",
        f"| window | {bundle.window} latent frames |",
    ]
    if bundle.parity:
        lines += [
            "",
            "Errors of one step against float32 torch, in standard deviations, measured at export:",
            "",
            "| engine | mean | at most |",
            "|---|---|---|",
        ]
        lines += [
            f"| {_text(p.engine)} {_text(p.precision)} | {p.mean:.2g} | {p.max:.2g} |"
            for p in bundle.parity
        ]
    return lines


def _text(text: str) -> str:
    """Return a manifest's text for Markdown, on one line, without tables or HTML in it."""
    return re.sub(r"([|<>`*_\[\]#\\])", r"\\\1", " ".join(text.split()))
