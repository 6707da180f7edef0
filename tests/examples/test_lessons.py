"""The scripts of the tutorials learn what they say, and write what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import fvae_deploy as fvae
from fvae_deploy.phantom.patient import varied

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    """Import a script of the folder examples/."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A folder with `scans` and `organs` of ten patients."""
    folder = tmp_path_factory.mktemp("cohort")
    for name in ("scans", "organs"):
        (folder / name).mkdir()
    for seed in range(10):
        scan, organs = (folder / name / f"{seed}.nii.gz" for name in ("scans", "organs"))
        fvae.write_phantom(scan, (64, 64, 45), organs, patient=varied(seed))
    return folder


def test_lungs_are_told_from_latents_of_scans_that_were_not_seen(cohort):
    pytest.importorskip("torch", reason="needs the train extra")
    pytest.importorskip("openvino")
    for scan in (cohort / "scans").iterdir():
        store = cohort / "latents" / scan.name.replace(".nii.gz", ".zarr")
        store.parent.mkdir(exist_ok=True)
        fvae.encode(scan, store)
    lesson = example("lungs_from_latents")
    folders = [str(cohort / "latents"), str(cohort / "organs")]
    ours, guessed = lesson.main([*folders, "--held-out", "2"])
    assert ours < 0.5 * guessed


def test_truth_belongs_to_the_slices_of_the_window(cohort, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the train extra")
    labels = np.zeros((2, 2, 9), np.uint8)
    labels[..., 5:] = 10  # the last latent frame of three alone
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / "a.nii.gz")
    truth = example("lungs_from_latents").LungShare(tmp_path)
    shares = [
        float(truth({"path": "a.zarr", "start": i, "frames": n, "latents": torch.zeros(1)})[1])
        for i, n in ((0, 1), (0, 2), (1, 1), (2, 1), (0, 3))
    ]
    np.testing.assert_allclose(shares, [0, 0, 0, 1, 4 / 9], rtol=1e-6)


def test_the_vae_of_the_lesson_gives_back_what_its_components_hold(cohort, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("safetensors", reason="needs the export extra")
    from safetensors.torch import load_file

    lesson = example("block_vae")
    scan = cohort / "scans" / "0.nii.gz"
    lesson.main([str(scan), "-o", str(tmp_path / "weights.safetensors")])
    network = lesson.vae()
    network.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    x = np.concatenate([*fvae.open_volume(scan).slabs(8)])[:8].clip(-1000, 1000) / 1000
    with torch.no_grad():
        z = network.encode(torch.from_numpy(x[None, None].astype(np.float32)))
        y = network.decode(z).numpy()[0, 0]
        again = network.encode(network.decode(z))
    assert z.shape == (1, lesson.CHANNELS, 2, 8, 8)
    torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-4)  # a projection
    assert np.abs(y - x).mean() < 0.25 * np.abs(x - x.mean()).mean()


def test_a_dataset_of_nnunet_is_made_of_scans_and_organs(cohort, tmp_path):
    out = tmp_path / "Dataset001_Liver"
    folders = [str(cohort / "scans"), str(cohort / "organs")]
    example("nnunet_dataset").main(
        [*folders, "-o", str(out), "--organ", "liver", "--organ", "spleen"]
    )
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    assert facts["numTraining"] == len([*(out / "imagesTr").iterdir()]) == 10
    label = np.asarray(nibabel.load(out / "labelsTr" / "0.nii.gz").dataobj)
    organs = np.asarray(nibabel.load(cohort / "organs" / "0.nii.gz").dataobj)
    np.testing.assert_array_equal(label == 1, organs == 5)
    np.testing.assert_array_equal(label == 2, organs == 1)
    assert (label == 1).any()
