"""Random patients are reproducible, differ from each other, and agree with their reports."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from fvae_deploy.organs import FINDINGS, finding_label, organ_label
from fvae_deploy.phantom.patient import PHASES, STANDARD, draw_finding, varied
from fvae_deploy.phantom.torso import FIELD_OF_VIEW, Torso

SHAPE = (64, 64, 45)
SPACING = tuple(mm / n for mm, n in zip(FIELD_OF_VIEW, SHAPE, strict=True))


def draw(patient, slices=range(SHAPE[2])):
    torso = Torso(SHAPE, SPACING, 0, patient)
    maps = zip(*(torso.slice(k) for k in slices), strict=True)
    return [np.stack(each) for each in maps]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_the_same_seed_gives_the_same_patient(seed):
    assert varied(seed) == varied(seed)
    assert varied(seed).report(3) == varied(seed).report(3)
    for a, b in zip(draw(varied(seed), [20]), draw(varied(seed), [20]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_patients_differ_in_anatomy_and_the_standard_one_has_no_findings():
    one, other, standard = (draw(p) for p in (varied(1), varied(2), STANDARD))
    assert (one[1] != other[1]).mean() > 0.05
    assert not standard[2].any()
    assert STANDARD.report().startswith(("No finding", "Normal lungs", "No acute finding"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["Lung nodule", "Pleural effusion", "Consolidation"])
def test_a_finding_lies_in_its_lung_and_changes_nothing_else(name, side):
    finding = draw_finding(name, side, np.random.default_rng(4))
    with_finding, healthy = varied(7, [finding]), varied(7, [])
    (hu, organs, findings), (before, same, none) = draw(with_finding), draw(healthy)
    np.testing.assert_array_equal(organs, same)
    assert not none.any()
    inside = findings == finding_label(name)
    assert inside.sum() > 5
    assert (findings > 0).sum() == inside.sum()
    x = np.nonzero(inside)[1]
    assert (x > 31).all() if side == "left" else (x < 32).all()
    assert hu[inside].mean() > -200 > before[inside].mean()
    changed = np.abs(hu.astype(int) - before) > 0
    near = binary_dilation(inside, np.ones((3, 5, 5)))
    assert not changed[~near].any()
    words = name.lower().removeprefix("lung ")
    for seed in range(4):
        text = with_finding.report(seed).lower()
        assert words in text
        assert side in text


@pytest.mark.parametrize("phase", PHASES)
def test_contrast_matches_the_phase(phase):
    patient = next(p for p in map(varied, range(50)) if p.phase == phase)
    hu, organs, _ = draw(patient)

    def level(organ: str) -> float:
        return float(np.median(hu[organs == organ_label(organ)]))

    low, high = {
        "without contrast": (20, 70),
        "portal venous phase": (150, 240),
        "arterial phase": (240, 360),
    }[phase]
    assert low < level("aorta") < high
    assert phase in patient.report().lower()
    assert level("liver") < (75 if phase == "without contrast" else 125)


def test_the_eighteen_findings_have_unique_labels():
    assert len(FINDINGS) == 18
    for label, name in FINDINGS.items():
        assert finding_label(name) == label
    with pytest.raises(KeyError):
        finding_label("Broken heart")
