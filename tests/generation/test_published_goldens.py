"""Conditions, schedules and a whole generation against recordings of the published code.

The recordings are beside the checkout, in ../shared/golden; without them these tests are skipped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from fvae_deploy.export.generator import Finding, Masks
from fvae_deploy.export.manifest import Intensity
from fvae_deploy.export.published import GENERATORS, HEALTHY, MULTI_DISEASE, SCHEDULE
from fvae_deploy.generation.conditions import PaintedMask
from fvae_deploy.generation.findings import DiseaseMask, open_disease
from fvae_deploy.generation.fit import Stretched
from fvae_deploy.generation.sampler import Sampler
from fvae_deploy.generation.texts import text_of
from fvae_deploy.volume.open import open_volume

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
RECORDED = GOLDEN / "generation"
pytestmark = pytest.mark.skipif(
    not RECORDED.is_dir(), reason="golden tensors are not here: expected ../shared/golden"
)
LEAN_VAE = Intensity(-1000, 1000, -0.5, 0.5)
SIZES = (400, 512, 513, 600, 768, 1024)


def recorded(name: str) -> Any:
    return np.load(RECORDED / f"{name}.npz")


def masks(generator: str) -> Masks:
    facts = GENERATORS[generator]
    findings = tuple(Finding(int(n), name) for n, name in facts["classes"].items())
    return Masks(facts["palette"], facts["finding_offset"], "", findings, body=True)


def painted(folder: Path, case: Any, generator: str, plane: int, disease: bool) -> PaintedMask:
    """Write the recorded case to files, and open them as the published code does."""
    ras = np.diag([-1.0, -1.0, 1.0, 1.0]) @ case["affine"]
    nibabel.save(nibabel.Nifti1Image(case["organ"], ras), folder / "organs.nii.gz")
    organs, given = open_volume(folder / "organs.nii.gz"), masks(generator)
    lesions = []
    if disease:
        nibabel.save(nibabel.Nifti1Image(case["disease"], np.eye(4)), folder / "d.nii.gz")
        file = open_disease(f"{folder / 'd.nii.gz'}={classes(case)}")
        lesions = [DiseaseMask(file, organs.geometry, given.findings)]
        assert "states no position" in lesions[0].remarks[0]
    return PaintedMask(organs, lesions, given, (plane, plane), parts=("stretch",))


def classes(case: Any) -> str:
    pairs = zip(case["disease_channel"], case["disease_class"], strict=True)
    return ",".join(f"{channel}:{number}" for channel, number in pairs)


@pytest.mark.parametrize(
    ("generator", "disease", "name"),
    [
        (MULTI_DISEASE, True, "volume_seg"),
        (MULTI_DISEASE, False, "volume_seg_healthy"),
        (HEALTHY, False, "volume_seg_healthyrepo_400"),
    ],
)
def test_masks_are_those_that_the_network_was_trained_on(tmp_path, generator, disease, name):
    case, wanted = recorded("conditions_inputs"), recorded("conditions_expected")
    mask = painted(tmp_path, case, generator, 512, disease)
    depth = mask.geometry.shape[2]
    found = mask.in_range(LEAN_VAE, depth, 0)
    assert found.dtype == wanted[name].dtype
    np.testing.assert_array_equal(found[0], wanted[name])
    if disease:
        planes = mask.planes()
        np.testing.assert_array_equal([next(planes) for _ in range(depth)], wanted["label_512"])
    np.testing.assert_allclose(  # by way of HU, in float32
        np.concatenate(list(mask.slabs(8))) / 2000, wanted[name], atol=6e-8
    )


def test_merged_findings_are_those_of_the_published_lists(tmp_path):
    case = recorded("conditions_inputs")
    mask = painted(tmp_path, case, MULTI_DISEASE, 512, True)
    found = np.stack([*mask._disease[0].planes(0)], axis=-1)
    np.testing.assert_array_equal(found, recorded("conditions_expected")["class_map"])


@pytest.mark.parametrize("size", SIZES)
def test_labels_and_images_are_resized_as_in_training(size):
    rules, fit = recorded("resize_rules"), Stretched((size, size), (1, 1), (512, 512))
    np.testing.assert_array_equal(fit._nearest(0), rules[f"nearest_{size}_to_512"])
    inside = fit._positions(0).clip(0, size - 1)
    np.testing.assert_allclose(inside, rules[f"linear_{size}_to_512"], atol=1e-3)


def test_texts_have_the_form_of_training():
    case, wanted = recorded("conditions_inputs"), recorded("conditions_expected")
    report = str(case["findings_en"][0]) + str(case["impressions_en"][0]).replace("Not given.", "")
    options = {"published": True, "listed": True}
    texts = [str(text) for text in case["texts"]]
    assert text_of(texts, None, "", **options) == str(wanted["input_text"][0])
    assert text_of(None, report, "", **options) == str(wanted["input_text_healthy"][0])
    assert text_of(report, None, "", published=True, listed=False) == str(
        wanted["input_text_healthyrepo"][0]
    )


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 10, 15, 20, 25, 30, 50, 100])
def test_steps_and_levels_are_the_published_ones(steps):
    of = recorded("schedules")
    sampler = Sampler(SCHEDULE, "ddim", steps, 1.0, strided=True)
    assert sampler.timesteps == of[f"steps{steps}_timesteps"].tolist()
    alpha, before = of[f"steps{steps}_alpha"], of[f"steps{steps}_alpha_prev"]
    np.testing.assert_allclose([sampler.signal(t) for t in sampler.timesteps], alpha, rtol=1e-6)
    levels = [sampler.signal(-1), *(sampler.signal(n) for n in reversed(range(len(alpha))))]
    np.testing.assert_allclose(levels, of[f"steps{steps}_hold_alpha"], rtol=1e-6)
    x, noise = (np.full((1, 1, 1, 1), n, np.float32) for n in (0.7, 1.3))
    for index, sigma in enumerate(of[f"steps{steps}_sigma"]):
        image = (0.7 - (1 - alpha[index]) ** 0.5 * 0.4) / alpha[index] ** 0.5
        wanted = before[index] ** 0.5 * image
        wanted += max(1 - before[index] - sigma**2, 0) ** 0.5 * 0.4 + sigma * 1.3
        found = sampler.step(index, np.full_like(x, 0.4), x, noise)
        np.testing.assert_allclose(found, wanted, rtol=2e-5)
    if 1000 % steps == 0:
        assert sampler.timesteps == Sampler(SCHEDULE, "ddim", steps, 1.0).timesteps
    np.testing.assert_allclose(
        [sampler.signal(t) for t in range(1000)], of["alphas_cumprod"], rtol=1e-6
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Path, Path]:
    """The recorded networks, exported as a user would, for planes of 64x64 pixels."""
    for package in ("torch", "onnxscript", "transformers", "diffusers"):
        pytest.importorskip(package, reason="needs the export extra")
    from fvae_deploy.export.generator import GeneratorManifest
    from fvae_deploy.export.generators import load_generator
    from fvae_deploy.export.sources import load
    from fvae_deploy.export.to_onnx import export_bundle, write_bundle

    generator, vae = (tmp_path_factory.mktemp("goldens") / name for name in ("generator", "vae"))
    write_bundle(
        load_generator(GOLDEN / "unet_b.ckpt", text=str(RECORDED / "text"), version="0"), generator
    )
    manifest = GeneratorManifest.load(generator)
    assert manifest.as_published == ("stretch", "text")
    dataclasses.replace(manifest, plane=(64, 64)).save(generator)
    vae.mkdir()
    for channels in ("published", "rgb"):  # both clamp each channel first
        loaded = load(str(GOLDEN / "leanvae_a.ckpt"), channels=channels)
        export_bundle(loaded, vae / channels, version="0")
    return generator, vae


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / wanted.std())


@pytest.mark.parametrize(("engine", "channels"), [("torch", "rgb"), ("openvino", "published")])
def test_a_published_generation_is_reproduced_from_the_command_line(
    bundles, tmp_path, monkeypatch, engine, channels
):
    """Masks, texts, noise, windows and HU: all as recorded, with `fvae generate --published`."""
    pytest.importorskip(engine)
    from safetensors import safe_open

    from fvae_deploy.cli import main as cli
    from fvae_deploy.stream.codec import Codec

    case, (generator, vae) = recorded("sampling_150_inputs"), bundles
    painted(tmp_path, case, MULTI_DISEASE, 64, True)  # writes the files
    coded: dict[str, list[np.ndarray]] = {"encode": [], "decode": []}
    encode, decode = Codec.encode, Codec.decode

    def encoded(self: Codec, x: np.ndarray, **more: Any) -> Any:
        coded["encode"].append(np.array(encode(self, x, **more)))
        return coded["encode"][-1]

    def decoded(self: Codec, z: np.ndarray, **more: Any) -> Any:
        coded["decode"].append(z)
        return decode(self, z, **more)

    monkeypatch.setattr(Codec, "encode", encoded)
    monkeypatch.setattr(Codec, "decode", decoded)
    with safe_open(RECORDED / "sampling_150.safetensors", "np") as file:
        golden = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = {
            name: json.loads(value) for name, value in file.metadata().items() if value[0] != "q"
        }
    command = ["generate", "--mask", tmp_path / "organs.nii.gz", "-o", tmp_path / "g.nii"]
    command += ["--disease", f"{tmp_path / 'd.nii.gz'}={classes(case)}", "--published"]
    command += [item for text in case["texts"] for item in ("--findings", text)]
    command += ["--model", generator, "--vae", vae / channels, "--engine", engine, "--quiet"]
    command += ["--seed", facts["seed"], "--steps", facts["steps"], "--json", tmp_path / "r.json"]
    monkeypatch.setattr("sys.argv", ["fvae", *map(str, command)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    # Windows of both passes are computed in turn, where the volume needs them.
    for kind, calls, names in (
        ("mask latents", coded["encode"], [n for n in sorted(golden) if n.startswith("mask_lat")]),
        ("latents", coded["decode"], ["latents.pass1", "latents.pass2"]),
    ):
        windows = [z.transpose(1, 0, 2, 3) * np.float32(1.52) for z in calls[::2] + calls[1::2]]
        found = np.concatenate(windows)
        wanted = np.concatenate([golden[name] for name in names])
        assert deviation(found, wanted) < 1e-4, kind
    made = np.asarray(nibabel.load(tmp_path / "g.nii").dataobj)
    assert made.dtype == np.int16
    off = np.abs(made.astype(int) - golden["hu_final_int16"])
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    report = json.loads((tmp_path / "r.json").read_text())["generator"]
    assert report["findings"] == facts["text"]
    assert "affine" not in report["as_published"]
    assert {"stretch", "text", "noise", "clamp", "truncate"} < set(report["as_published"])
