"""The phantom is the same torso on every grid, drawn slice by slice, with plausible HU."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.organs import ORGANS, organ_label, organ_name
from fvae_deploy.phantom.patient import STANDARD
from fvae_deploy.phantom.torso import FIELD_OF_VIEW, Torso, write_phantom
from fvae_deploy.volume.open import open_volume

SHAPE = (96, 90, 60)


def torso(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Torso:
    x, y, z = (mm / n for mm, n in zip(FIELD_OF_VIEW, shape, strict=True))
    return Torso(shape, (x, y, z), seed)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Return HU and labels of the whole torso, [z, x, y]."""
    slices = [torso().slice(k) for k in range(SHAPE[2])]
    return np.stack([s.hu for s in slices]), np.stack([s.organs for s in slices])


def test_the_files_contain_the_slices_in_order(tmp_path: Path, drawn):
    path, organs = tmp_path / "ct.nii.gz", tmp_path / "organs.nii.gz"
    done: list[int] = []
    write_phantom(path, SHAPE, labels=organs, progress=done.append)
    assert sum(done) == SHAPE[2]
    for file, expected in zip((path, organs), drawn, strict=True):
        reader = open_volume(file)
        np.testing.assert_array_equal(np.concatenate(list(reader.slabs(7))), expected)
        assert reader.geometry.orientation == "LPS"
        np.testing.assert_allclose(np.multiply(reader.geometry.spacing, SHAPE), FIELD_OF_VIEW)
        reader.close()


def test_a_slice_does_not_depend_on_the_slices_drawn_before_it(drawn):
    source = torso()
    for k in (50, 3, 31, 3):
        np.testing.assert_array_equal(source.slice(k)[0], drawn[0][k])


def test_the_seed_changes_the_noise_but_not_the_organs(drawn):
    hu, labels, _ = torso(seed=1).slice(30)
    np.testing.assert_array_equal(labels, drawn[1][30])
    assert (hu != drawn[0][30]).mean() > 0.8
    assert abs(float(hu.mean()) - float(drawn[0][30].mean())) < 5


def test_noise_has_the_promised_sigma_and_correlation():
    source = torso((256, 256, 4))
    noise = np.stack([source._noise(k) for k in range(4)])
    assert noise.std() == pytest.approx(STANDARD.noise, rel=0.02)
    assert np.mean(noise[:, 1:] * noise[:, :-1]) > 0.3 * STANDARD.noise**2  # neighbours correlate
    assert abs(np.mean(noise[1:] * noise[:-1])) < 0.02 * STANDARD.noise**2  # slices do not


@pytest.mark.parametrize(
    ("organ", "low", "high"),
    [
        ("lung_upper_lobe_left", -950, -750),
        ("lung_middle_lobe_right", -950, -750),
        ("liver", 90, 130),
        ("spleen", 100, 140),
        ("aorta", 180, 230),
        ("kidney_right", 30, 190),
        ("vertebrae_L3", 150, 600),
        ("rib_left_5", 150, 800),
        ("spinal_cord", 10, 60),
    ],
)
def test_organ_has_its_hounsfield_units(drawn, organ: str, low: float, high: float):
    inside = drawn[0][drawn[1] == organ_label(organ)]
    assert inside.size > 20
    assert low < np.median(inside) < high


def test_air_surrounds_the_body_and_the_couch_is_behind_it(drawn):
    hu = drawn[0]
    assert abs(float(hu[:, :6, :20].mean()) + 1000) < 2
    back, front = hu[:, 30:66, -20:], hu[:, 30:66, :8]
    assert back.max() > -450
    assert front.max() < -900
    assert hu.min() >= -1024


def test_the_patient_is_not_mirrored(drawn):
    """Axes are LPS: x grows to the left, y to the back, z to the head."""

    def centre(organ: str) -> np.ndarray:
        return np.argwhere(drawn[1] == organ_label(organ)).mean(axis=0)  # z, x, y

    assert centre("liver")[1] < centre("spleen")[1]
    assert centre("sternum")[2] < centre("heart")[2] < centre("vertebrae_T8")[2]
    assert centre("vertebrae_L4")[0] < centre("liver")[0] < centre("lung_upper_lobe_left")[0]


def test_another_z_extent_samples_the_same_torso():
    coarse, fine = torso((64, 64, 15)), torso((64, 64, 45))
    for k in (2, 7, 12):  # slice k of one is slice 3 k + 1 of the other
        np.testing.assert_array_equal(coarse.slice(k)[1], fine.slice(3 * k + 1)[1])


def test_memory_does_not_grow_with_the_number_of_slices(tmp_path: Path):
    peaks = []
    for slices in (24, 24, 200):  # the first run warms up imports and caches
        tracemalloc.start()
        write_phantom(tmp_path / "ct.nii", (48, 48, slices), overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(st.integers(8, 40), st.integers(8, 40), st.integers(1, 9)),
    seed=st.integers(0, 2**32),
)
def test_any_shape_draws_every_slice(shape: tuple[int, int, int], seed: int):
    source = torso(shape, seed)
    for k in range(shape[2]):
        hu, labels, _ = source.slice(k)
        assert hu.shape == labels.shape == shape[:2]
        assert hu.dtype == np.int16


@pytest.mark.parametrize("shape", [(7, 8, 1), (8, 7, 1), (8, 8, 0)])
def test_a_shape_too_small_is_refused(tmp_path: Path, shape: tuple[int, int, int]):
    with pytest.raises(UsageError, match="at least 8x8x1"):
        write_phantom(tmp_path / "ct.nii", shape)
    assert not list(tmp_path.iterdir())


def test_the_same_path_for_ct_and_labels_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="different outputs"):
        write_phantom(tmp_path / "a.nii", (8, 8, 2), labels=tmp_path / "." / "a.nii")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", ["ct.nii", "organs.nii", "findings.nii"])
def test_an_existing_output_is_kept_unless_overwrite_is_set(tmp_path: Path, existing: str):
    path, labels, findings = (tmp_path / f"{name}.nii" for name in ("ct", "organs", "findings"))
    (tmp_path / existing).write_bytes(b"precious")
    drawn: list[int] = []

    def write(overwrite: bool) -> None:
        write_phantom(
            path,
            (8, 8, 2),
            labels=labels,
            progress=drawn.append,
            findings=findings,
            overwrite=overwrite,
        )

    with pytest.raises(VolumeError, match=rf"{existing} exists: choose .* or pass --overwrite"):
        write(overwrite=False)
    assert not drawn
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_bytes() == b"precious"
    write(overwrite=True)
    for file in (path, labels, findings):
        assert open_volume(file).geometry.shape == (8, 8, 2)


def test_a_spacing_of_zero_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="above 0 mm"):
        write_phantom(tmp_path / "ct.nii", (8, 8, 1), spacing=(1, 0, 1))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (1, "spleen"),
        (14, "lung_lower_lobe_right"),
        (26, "vertebrae_S1"),
        (50, "vertebrae_C1"),
        (77, "hip_left"),
        (103, "rib_left_12"),
        (117, "costal_cartilages"),
        (205, "label 205"),
    ],
)
def test_organ_names_follow_totalsegmentator(label: int, name: str):
    assert organ_name(label) == name


def test_organ_numbers_and_names_are_one_to_one():
    assert sorted(map(organ_label, ORGANS.values())) == list(range(1, 118))
