"""The recipes of docs/recipes.md, with small random networks: each is cut, and runs in segments."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
diffusers = pytest.importorskip("diffusers", reason="needs the export extra")

from fvae_deploy.export.cut.stages import cut_whole_stages  # noqa: E402
from fvae_deploy.export.models.any_torch import load  # noqa: E402
from fvae_deploy.export.probe import parts_of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
BLOCKS = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
DOWN, UP = ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2
PLAIN = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
VIT = ("ResBlock", "EfficientViTBlock")
SMALL: dict[str, tuple[str, int, dict[str, Any]]] = {  # class, window, configuration
    "flux2": ("AutoencoderKLFlux2", 1, {
        "block_out_channels": [8, 16], "down_block_types": DOWN, "up_block_types": UP,
        "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 8,
    }),
    "dc": ("AutoencoderDC", 1, {
        "latent_channels": 8, "attention_head_dim": 4, "encoder_block_types": VIT,
        "decoder_block_types": VIT, "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)),
        "decoder_qkv_multiscales": ((), (5,)),
    }),
    "svd": ("AutoencoderKLTemporalDecoder", 3, {
        "latent_channels": 4, "block_out_channels": [32, 32], "down_block_types": DOWN,
        "layers_per_block": 1,
    }),
    "cogvideox": ("AutoencoderKLCogVideoX", 9, {**PLAIN, "latent_channels": 4}),
    "hunyuanvideo15": ("AutoencoderKLHunyuanVideo15", 5, {
        "latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16), "layers_per_block": 1,
    }),
    "allegro": ("AutoencoderKLAllegro", 4, {**PLAIN, "latent_channels": 4}),
}  # fmt: skip
# Networks that need a name only.
NAMED: dict[str, tuple[int, dict[str, Any]]] = {
    "AutoencoderKLMagvit": (5, {
        "latent_channels": 4, "block_out_channels": [8, 8, 8], "layers_per_block": 1,
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 2],
        "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 2],
        "norm_num_groups": 4,
    }),
    "AutoencoderKLCosmos": (9, {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 16, 16), "num_layers": 1,
        "decode_block_out_channels": (8, 16, 16, 16), "attention_resolutions": (32,),
        "resolution": 64, "latents_mean": None, "latents_std": None,
    }),
    "AutoencoderKLMochi": (7, {
        "encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4,
        "latent_channels": 4, "layers_per_block": (1,) * 5, "latents_mean": None,
        "latents_std": None,
    }),
    "AutoencoderKLHunyuanVideo": (5, {**PLAIN, "latent_channels": 4}),
}  # fmt: skip


def cut(monkeypatch: pytest.MonkeyPatch, vae: Any, window: int, **options: Any) -> Any:
    """Export as far as the cutter, which compares all segments with the whole network."""
    module = ModuleType("recipe")
    module.vae = vae  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "recipe", module)
    model, _ = load("recipe:vae", window=window, **options)
    return cut_whole_stages(model.stages, parts_of(model), model.foreign)


def runs_in_pieces(parts: Any, programs: Any) -> None:
    assert [part.whole for part in parts if "not cut" in part.whole] == []
    assert [program.whole for program in programs if program.whole] == []
    cut_stages = {program.stage for program in programs}
    assert all(part.halo is not None or part.stage in cut_stages for part in parts)


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_is_cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, window, config = SMALL[name]
    network = getattr(diffusers, kind)
    monkeypatch.setattr(
        network, "from_pretrained", classmethod(lambda cls, *a, **k: seeded(cls, config))
    )
    space: dict[str, Any] = {}
    for block in dict.fromkeys(("flux2", name)):  # the first block has the class for slices
        exec(BLOCKS[block], space)
    runs_in_pieces(*cut(monkeypatch, space["vae"], window)[:2])


@pytest.mark.parametrize("name", NAMED)
def test_a_network_by_name_is_cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    window, config = NAMED[name]
    runs_in_pieces(*cut(monkeypatch, lambda: seeded(getattr(diffusers, name), config), window)[:2])


@pytest.mark.parametrize("name", ["maisi", "medvae"])
def test_a_medical_recipe_is_cut(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = {"maisi": "monai", "medvae": "medvae"}[name]
    pytest.importorskip(package, reason="the authors' code is not installed")
    small = {"[64, 128, 256]": "[8, 16, 16]", "norm_num_groups=32": "norm_num_groups=4",
             "[2, 2, 2]": "[1, 1, 1]", "ch=128": "ch=32", "num_res_blocks=2": "num_res_blocks=1",
             "ch_mult=[1, 2, 4]": "ch_mult=[1, 1, 1]"}  # fmt: skip
    code = BLOCKS[name]
    for published, tried in small.items():
        code = code.replace(published, tried)
    space: dict[str, Any] = {}
    exec(code, space)
    runs_in_pieces(*cut(monkeypatch, space["vae"], 8)[:2])


def test_every_recipe_is_tried() -> None:
    assert set(BLOCKS) == {*SMALL, "maisi", "medvae"}


def seeded(kind: Any, config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return kind(**config)
