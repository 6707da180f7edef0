"""The table of known models is complete and consistent, and imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fvae_deploy.export.hub import is_hub_id, parse
from fvae_deploy.export.known import KNOWN, KnownModel, known

ROOT = Path(__file__).parents[2]
PAPER = ["wan2.1", "wan2.2", "leanvae4", "leanvae16", "cv-vae", "iv-vae", "videovae+", "wf-vae"]
FIELD = [
    "qwen-image-vae",
    "ltx-video-vae",
    "ltx2-vae",
    "vidtok4",
    "vidtok8",
    "vidtok16",
    "vidtok-288",
    "vidtok-444",
    "vidtok-41616",
    "vidtok16-v1.1",
    "vidtok-fsq",
    "sd-vae",
    "sdxl-vae",
    "sd3-vae",
    "flux-vae",
    "taesd",
    "taesdxl",
    "taesd3",
    "taef1",
    "taef2",
]
FAMILIES = {"wan", "ltx", "vidtok", "lean_vae", "kl", "tiny", "tae", "own code"}

every_model = pytest.mark.parametrize("model", KNOWN, ids=lambda model: model.name)


def test_every_model_is_listed_once() -> None:
    assert sorted(model.name for model in KNOWN) == sorted([*PAPER, *FIELD])
    for model in KNOWN:
        assert known(model.name) is model
    assert known("no such model") is None


def test_only_the_papers_models_have_the_papers_window() -> None:
    windows = {model.name: model.window for model in KNOWN if model.window}
    assert windows == dict.fromkeys(PAPER, 65) | {"videovae+": 64}


@every_model
def test_hub_ids_can_be_parsed(model: KnownModel) -> None:
    if model.hub:
        assert is_hub_id(model.hub)
        assert parse(model.hub).id == model.hub
        assert parse(model.hub).is_file == (model.family in ("lean_vae", "tae", "vidtok"))
    else:
        assert model.family == "own code"
        assert "weights at " in model.note or "weights linked from " in model.note


@every_model
def test_fields_have_plausible_values(model: KnownModel) -> None:
    assert model.family in FAMILIES
    strides = {"wan": 4, "ltx": 8, "vidtok": 2 if model.name == "vidtok-288" else 4}
    assert model.temporal == strides.get(model.family, 4 if model.window else 1)
    assert model.spatial in (4, 8, 16, 32)
    assert model.latent_channels in (4, 5, 8, 16, 32, 48, 128)
    assert model.model_range == ((-0.5, 0.5) if model.family == "lean_vae" else (-1.0, 1.0))
    assert model.window % model.temporal in (0, 1)
    for text in (model.licence, model.note):
        assert text.strip() == text != ""
        assert text.isprintable()


def test_the_table_imports_nothing_heavy() -> None:
    code = "import sys, fvae_deploy.export.known\n"
    code += "print({'torch', 'numpy', 'huggingface_hub', 'diffusers'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
