"""Label numbers of other data sets, compared with lists written down here independently."""

from __future__ import annotations

import json

import pytest

from fvae_deploy.errors import ConditionError
from fvae_deploy.generation.conditions import read_labels
from fvae_deploy.generation.presets import PRESETS, organ_of
from fvae_deploy.organs import ORGANS, organ_label

# A few of each block of MAISI's table, by the names in its file.
MAISI = {
    1: "liver", 3: "spleen", 5: "kidney_right", 14: "kidney_left", 17:
    "portal_vein_and_splenic_vein", 22: "brain", 28: "lung_upper_lobe_left",
    32: "lung_lower_lobe_right", 33: "vertebrae_L5", 37: "vertebrae_L1", 38: "vertebrae_T12",
    49: "vertebrae_T1", 50: "vertebrae_C7", 56: "vertebrae_C1", 57: "trachea",
    61: "iliac_vena_right", 62: "colon", 63: "rib_left_1", 74: "rib_left_12", 75: "rib_right_1",
    86: "rib_right_12", 87: "humerus_left", 96: "hip_right", 97: "sacrum",
    98: "gluteus_maximus_left", 107: "iliopsoas_right", 108: "atrial_appendage_left",
    114: "costal_cartilages", 115: "heart", 118: "prostate", 119: "pulmonary_vein", 120: "skull",
    121: "spinal_cord", 122: "sternum", 123: "subclavian_artery_left", 126: "thyroid_gland",
    127: "vertebrae_S1", 132: "trachea",
}  # fmt: skip


def test_maisi_has_132_labels_and_every_organ_of_totalsegmentator():
    table = PRESETS["maisi"]
    assert sorted(table) == [*range(133), 200]
    assert table[200] == 0  # the body, in the masks that MAISI gives
    assert {n: table[n] for n in MAISI} == {n: organ_label(name) for n, name in MAISI.items()}
    assert set(table.values()) == {0, *ORGANS}
    for tumour, organ in ((24, "pancreas"), (26, "liver"), (27, "colon")):
        assert table[tumour] == organ_label(organ)


def test_the_abdominal_challenges():
    btcv = "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta "
    btcv += "inferior_vena_cava portal_vein_and_splenic_vein pancreas adrenal_gland_right "
    btcv += "adrenal_gland_left"
    amos = "spleen kidney_right kidney_left gallbladder esophagus liver stomach aorta "
    amos += "inferior_vena_cava pancreas adrenal_gland_right adrenal_gland_left duodenum "
    amos += "urinary_bladder prostate"
    for name, names in (("btcv", btcv), ("amos", amos)):
        expected = {0: 0} | {n: organ_label(o) for n, o in enumerate(names.split(), start=1)}
        assert read_labels(name) == PRESETS[name] == expected
    assert read_labels("TotalSegmentator") == {0: 0} | {n: n for n in ORGANS}


@pytest.mark.parametrize("name", sorted(ORGANS.values()))
def test_every_organ_is_known_in_several_spellings(name):
    number = organ_label(name)
    assert organ_of(name) == organ_of(name.replace("_", " ").title()) == number
    for side in ("left", "right"):
        if side in name.split("_"):
            assert organ_of(f"{side} {name.replace(f'_{side}', '')}") == number


def test_both_versions_of_an_nnunet_dataset(tmp_path):
    path = tmp_path / "dataset.json"
    for labels in (
        {"background": 0, "liver": 1, "Left Kidney": 2, "bladder": 3},
        {"0": "background", "1": "liver", "2": "kidney_left", "3": "urinary bladder"},
    ):
        path.write_text(json.dumps({"labels": labels, "numTraining": 1}))
        assert read_labels(path) == {0: 0, 1: 5, 2: 3, 3: 21}
    labels = {"background": 0, "liver": [1, 2], "tumor": 2, "spleen": 3}
    path.write_text(json.dumps({"labels": labels}))
    assert read_labels(path) == {0: 0, 1: 5, 2: 5, 3: 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"labels": {"background": 0, "tumor": 1}}, "'tumor' \\(1\\)"),
        ({"labels": {"background": 0, "liver": "x"}}, "found"),
        ({"labels": {"liver": None}}, "found"),
        ([1], "a list"),
    ],
)
def test_what_is_no_organ_is_named(content, words, tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConditionError, match=words):
        read_labels(path)


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(ConditionError, match="totalsegmentator, maisi, btcv, amos"):
        read_labels("flare")
