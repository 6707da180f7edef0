"""Mask adherence, histograms and noise of one CT, against definitions on whole volumes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from fvae_deploy.organs import organ_label
from fvae_deploy.report.blocks import blocks
from fvae_deploy.report.tissues import AIR, BONE
from fvae_deploy.score.adherence import Adherence
from fvae_deploy.score.examine import Lens, Source, examine
from fvae_deploy.score.features import LatentFeatures
from fvae_deploy.score.histograms import BIN, FEWEST, Histograms
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume
from fvae_deploy.volume.options import ReadOptions

SHAPE = (14, 30, 26)  # t, x, y
GEOMETRY = Geometry((30, 26, 14), np.diag([-1.0, -1.5, 2.0, 1.0]))
LIVER, RIB = organ_label("liver"), organ_label("rib_left_5")
LUNG = organ_label("lung_upper_lobe_left")


def scene(seed=0):
    """HU, a mask, a label map that differs from it, and tissues [t, x, y]."""
    random = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.int64)
    mask[2:12, 5:20, 4:12] = LIVER
    mask[3:11, 6:18, 14:22] = LUNG
    mask[1:13, 24:27, 5:20] = RIB
    labels = np.roll(mask, (1, 1), axis=(0, 1))
    hu = random.normal(50, 20, SHAPE)
    hu[mask == LUNG] = -850
    hu[mask == RIB] = 500
    tissue = np.where(labels == LUNG, AIR, np.where(labels == RIB, BONE, 3)).astype(np.uint8)
    return {"original": hu, "mask": mask, "labels": labels, "tissue": tissue, "organs": mask}


def through(sections, arrays, depth=5, halo=4):
    slabs = ({n: a[z : z + 3] for n, a in arrays.items()} for z in range(0, SHAPE[0], 3))
    for block in blocks(slabs, depth, halo, SHAPE[0]):
        for section in sections:
            section.add(block)
    return [section.result() for section in sections]


def by_monai(a, b):
    """Dice and NSD at 2 mm of two masks, by MONAI."""
    torch = pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("monai", reason="needs the dev extra")
    pair = [torch.from_numpy(m[None, None].astype(np.float32)) for m in (b, a)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import compute_dice, compute_surface_dice

        dice = compute_dice(*pair).item()
        nsd = compute_surface_dice(
            *pair, [2.0], include_background=True, spacing=[2.0, 1.0, 1.5]
        ).item()
    return dice, nsd


@pytest.mark.parametrize("depth", [3, 5, 14])
def test_dice_and_nsd_by_organ_are_monais_however_the_volume_is_cut(depth):
    arrays = scene()
    arrays["labels"][0, 0, 0] = organ_label("spleen")  # only in the label map: left out
    (found,) = through([Adherence(GEOMETRY, 8.0, labelled=True)], arrays, depth)
    assert set(found["dice"]) == {"liver", "lung upper lobe left", "rib left 5"}
    for name, label in (("liver", LIVER), ("rib left 5", RIB)):
        dice, nsd = by_monai(arrays["mask"] == label, arrays["labels"] == label)
        assert found["dice"][name] == pytest.approx(dice)
        assert found["nsd"][name] == pytest.approx(nsd)


def test_without_a_label_map_thresholds_are_the_segmenter():
    arrays = scene()
    (found,) = through([Adherence(GEOMETRY, 8.0, labelled=False)], arrays)
    for name, label, tissue in (("lungs and trachea", LUNG, AIR), ("bones", RIB, BONE)):
        dice, nsd = by_monai(arrays["mask"] == label, arrays["tissue"] == tissue)
        assert found["dice"][name] == pytest.approx(dice)
        assert found["nsd"][name] == pytest.approx(nsd)


def test_an_organ_that_is_missing_scores_0():
    arrays = scene()
    arrays["labels"] = np.where(arrays["labels"] == LIVER, 0, arrays["labels"])
    (found,) = through([Adherence(GEOMETRY, 8.0, labelled=True)], arrays)
    assert (found["dice"]["liver"], found["nsd"]["liver"]) == (0, 0)


def test_shares_of_hu_that_fit_count_voxels_of_the_mask():
    arrays = scene()
    arrays["original"][(arrays["mask"] == LUNG).nonzero()[0][0]] = 0
    (found,) = through([Adherence(GEOMETRY, 8.0, labelled=False)], arrays)
    lung = arrays["original"][arrays["mask"] == LUNG]
    assert 0 < found["fits"]["air"] < 1
    assert found["fits"]["air"] == pytest.approx((lung < -500).mean())
    rib = arrays["original"][arrays["mask"] == RIB]
    assert found["fits"]["bone"] == pytest.approx((rib > 100).mean())


def test_histograms_count_the_hu_of_each_organ():
    arrays = scene()
    arrays["organs"] = arrays["organs"].copy()
    arrays["organs"][0, 0, :9] = organ_label("aorta")  # too few voxels
    (found,) = through([Histograms((-1000.0, 1000.0), "organs")], arrays)
    assert set(found) == {"liver", "lung upper lobe left", "rib left 5"}
    assert FEWEST > 9
    hu = arrays["original"][arrays["mask"] == LIVER]
    edges = -1000 + BIN * np.arange(502)
    np.testing.assert_array_equal(found["liver"], np.histogram(hu, edges)[0])


def test_the_spectrum_of_white_noise_grows_with_frequency_and_adds_up_to_the_noise(tmp_path):
    """White noise has HU² in proportion to the area of a ring; the corners are beyond the bands."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(160) - 80, np.arange(160) - 80, indexing="ij")
    hu = np.where(np.hypot(x, y) < 75, 50, -1000) + random.normal(0, 12, (8, 160, 160))
    geometry = Geometry((160, 160, 8), np.diag([-1.0, -1.0, 2.0, 1.0]))
    with create_volume(tmp_path / "ct.nii", geometry, "float32") as writer:
        writer.write(hu.astype(np.float32))
    with open_codec("tiny", threads=1) as codec:
        lens = Lens((1.0, 1.0, 2.0), LatentFeatures(codec))
        source = Source("ct", tmp_path / "ct.nii")
        (tmp_path / "work").mkdir()
        seen = examine(source, lens, ReadOptions(), tmp_path / "work")
    inside = np.pi / 4  # of the area of all frequencies
    assert seen.noise == pytest.approx(12, rel=0.1)
    assert np.square(seen.spectrum).sum() == pytest.approx(144 * inside, rel=0.15)
    assert (np.diff(seen.spectrum[:-1]) > 0).all()
    assert seen.adherence is None
    assert set(seen.features) == {"latents axial", "latents coronal", "latents sagittal"}
