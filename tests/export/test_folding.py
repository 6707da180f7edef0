"""Weights are folded to the same bytes whichever instructions a processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("diffusers", reason="needs the export extra")
from random_image_vae import KL, TINY, random_image_vae  # noqa: E402
from random_lean_vae import SMALL, random_lean_vae  # noqa: E402
from random_wan import CONFIGS, random_wan  # noqa: E402

FOLD = """
import hashlib, sys
from fvae_deploy.export.sources import load
for source in sys.argv[1:]:
    for channels in ("published", "gray", "rgb"):
        stages = load(source, channels=channels).model.stages
        tensors = {f"{n}.{k}": v for n, s in stages.items() for k, v in s.state_dict().items()}
        for name, value in sorted(tensors.items()):
            print(channels, name, hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest())
"""
PLAIN = {  # without the wide instructions of this processor
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "OMP_NUM_THREADS": "1",
}


def folded(sources: list[Path], **environment: str) -> list[str]:
    command = [sys.executable, "-c", FOLD, *map(str, sources)]
    run = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def test_the_weights_of_a_bundle_are_the_same_on_every_processor(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("lean.ckpt", "kl", "tiny", *CONFIGS)]
    state = {"args": asdict(SMALL), "state_dict": random_lean_vae(SMALL, 0).state_dict()}
    torch.save(state, sources[0])
    for source, kind, configs in zip(
        sources[1:3], ("AutoencoderKL", "AutoencoderTiny"), (KL, TINY), strict=True
    ):
        random_image_vae(kind, next(iter(configs.values())), 0).save_pretrained(source)
    for source, config in zip(sources[3:], CONFIGS.values(), strict=True):
        random_wan(config, 0).save_pretrained(source)
    here, plain = folded(sources), folded(sources, **PLAIN)
    assert len(here) > 100
    assert [a for a, b in zip(here, plain, strict=True) if a != b] == []
