"""Label numbers of other data sets in the numbers of TotalSegmentator, by name for --labels.

    totalsegmentator    the 117 classes of TotalSegmentator v2, task "total"
    maisi               the 132 classes of MAISI and VISTA-3D, and 200, the rest of the body
    btcv, amos          the 13 and 15 organs of the two abdominal challenges

The numbers of MAISI are those of configs/label_dict_ctmr.json in NVIDIA-Medtech/NV-Generate-CTMR
on GitHub, compared with the list of VISTA-3D in Project-MONAI/MONAILabel. Those of BTCV and AMOS
are in Evaluation/label_systems.py of uni-medical/A-Eval. MAISI's own masks also contain 200 for
the body, which its list lacks (issue 2047 of Project-MONAI/tutorials). Tumours count as the organ
they lie in. What is no organ of TotalSegmentator becomes 0, as everything else in its masks; so
do a lung and a lung tumour of unknown side, since lesions are placed by side.

`dataset_labels` reads the labels of an nnU-Net `dataset.json`, of either version.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fvae_deploy.organs import ORGANS

NOTHING = ""  # in a list of names: no organ
# What other data sets call an organ, after `_plain` -> TotalSegmentator's name. Where a class
# covers several organs, one of them stands for all.
SYNONYMS = {
    "background": NOTHING,
    "ignore": NOTHING,
    "bladder": "urinary_bladder",
    "postcava": "inferior_vena_cava",
    "ivc": "inferior_vena_cava",
    "prostate_uterus": "prostate",
    "esophagus": "esophagus",
    "oesophagus": "esophagus",
    "gall_bladder": "gallbladder",
    "small_intestine": "small_bowel",
    "intestine": "small_bowel",
    "rectum": "colon",
    "airway": "trachea",
    "adrenal": "adrenal_gland_right",
    "left_lung": "lung_upper_lobe_left",
    "lung_left": "lung_upper_lobe_left",
    "right_lung": "lung_upper_lobe_right",
    "lung_right": "lung_upper_lobe_right",
    "kidney": "kidney_right",
    "kidneys": "kidney_right",
    "pancreatic_tumor": "pancreas",
    "hepatic_tumor": "liver",
    "liver_tumor": "liver",
    "hepatic_vessel": "liver",
    "colon_cancer_primaries": "colon",
    "kidney_mass": "kidney_right",
}


def _maisi() -> Iterator[tuple[int, str]]:
    yield from enumerate(
        ("liver", "kidney", "spleen", "pancreas", "kidney_right", "aorta", "inferior_vena_cava",
         "adrenal_gland_right", "adrenal_gland_left", "gallbladder", "esophagus", "stomach",
         "duodenum", "kidney_left", "bladder", "prostate_uterus", "portal_vein_and_splenic_vein",
         "rectum", "small_bowel", NOTHING, NOTHING, "brain", NOTHING, "pancreatic_tumor",
         "hepatic_vessel", "hepatic_tumor", "colon_cancer_primaries", "lung_upper_lobe_left",
         "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right",
         "lung_lower_lobe_right"), start=1,
    )  # fmt: skip
    spine = [f"vertebrae_{part}{n}" for part, last in (("L", 5), ("T", 12), ("C", 7))
             for n in range(last, 0, -1)]  # fmt: skip
    yield from enumerate(spine, start=33)
    yield from enumerate(
        ("trachea", "iliac_artery_left", "iliac_artery_right", "iliac_vena_left",
         "iliac_vena_right", "colon"), start=57,
    )  # fmt: skip
    ribs = [f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)]
    yield from enumerate(ribs, start=63)
    pairs = ("humerus", "scapula", "clavicula", "femur", "hip")
    yield from enumerate((f"{p}_{side}" for p in pairs for side in ("left", "right")), start=87)
    yield 97, "sacrum"
    pairs = ("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas")
    yield from enumerate((f"{p}_{side}" for p in pairs for side in ("left", "right")), start=98)
    yield from enumerate(
        ("atrial_appendage_left", "brachiocephalic_trunk", "brachiocephalic_vein_left",
         "brachiocephalic_vein_right", "common_carotid_artery_left", "common_carotid_artery_right",
         "costal_cartilages", "heart", "kidney_cyst_left", "kidney_cyst_right", "prostate",
         "pulmonary_vein", "skull", "spinal_cord", "sternum", "subclavian_artery_left",
         "subclavian_artery_right", "superior_vena_cava", "thyroid_gland", "vertebrae_S1",
         NOTHING, "kidney_mass", "liver_tumor", "vertebrae_L5", "airway"), start=108,
    )  # fmt: skip
    yield 200, NOTHING


_ABDOMEN = ("spleen", "kidney_right", "kidney_left", "gallbladder", "esophagus", "liver", "stomach",
            "aorta", "inferior_vena_cava")  # fmt: skip
_BTCV = (*_ABDOMEN, "portal_vein_and_splenic_vein", "pancreas", "adrenal_gland_right",
         "adrenal_gland_left")  # fmt: skip
_AMOS = (*_ABDOMEN, "pancreas", "adrenal_gland_right", "adrenal_gland_left", "duodenum", "bladder",
         "prostate_uterus")  # fmt: skip


def _plain(name: str) -> str:
    """Return a name in lower case, its words joined by underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def organ_of(name: str) -> int:
    """Return TotalSegmentator's number of an organ as other data sets call it; 0 for background.

    The side may stand before or after the organ: "left kidney", "kidney_left". Raises ValueError
    for an unknown name.
    """
    plain = _plain(name)
    words = plain.split("_")
    sides = [word for word in words if word in ("left", "right")]
    rest = "_".join(word for word in words if word not in ("left", "right"))
    for each in (plain, *(f"{rest}_{side}" for side in sides)):
        each = SYNONYMS.get(each, each)
        if each == NOTHING:
            return 0
        if each in _NUMBERS:
            return _NUMBERS[each]
        found = _SORTED.get("_".join(sorted(each.split("_"))))
        if found is not None:
            return found
    raise ValueError(f"no organ of TotalSegmentator named {name!r}")


_NUMBERS = {_plain(name): number for number, name in ORGANS.items()}
_SORTED = {"_".join(sorted(name.split("_"))): number for name, number in _NUMBERS.items()}


def _table(names: Mapping[int, str]) -> dict[int, int]:
    return {0: 0} | {n: organ_of(name) if name else 0 for n, name in names.items()}


PRESETS: dict[str, dict[int, int]] = {
    "totalsegmentator": {0: 0} | {n: n for n in ORGANS},
    "maisi": _table(dict(_maisi())),
    "btcv": _table(dict(enumerate(_BTCV, start=1))),
    "amos": _table(dict(enumerate(_AMOS, start=1))),
}


def is_dataset(content: Mapping[str, Any]) -> bool:
    """Return whether this is the content of an nnU-Net `dataset.json`."""
    return isinstance(content.get("labels"), dict)


def dataset_labels(content: Mapping[str, Any]) -> dict[int, int]:
    """Return the labels of a `dataset.json` in TotalSegmentator's numbers.

    Version 2 has names with numbers, version 1 numbers with names. A region, with several numbers,
    gives its organ to those numbers that have no name of their own. Raises ValueError for names
    that are no organ.
    """
    single: dict[int, str] = {}
    regions: list[tuple[str, list[int]]] = []
    for key, value in content["labels"].items():
        if isinstance(value, str):
            single[int(key)] = value
        elif isinstance(value, list):
            regions.append((str(key), [int(n) for n in value]))
        else:
            single[int(value)] = str(key)
    table: dict[int, int] = {0: 0}
    unknown: dict[int, str] = {}
    for number, name in single.items():
        try:
            table[number] = organ_of(name)
        except ValueError:
            unknown[number] = name
    for name, numbers in sorted(regions, key=lambda region: len(region[1])):
        for number in numbers:
            if number not in table:
                table[number] = organ_of(name)
                unknown.pop(number, None)
    if unknown:
        named = ", ".join(f"{name!r} ({number})" for number, name in sorted(unknown.items()))
        raise ValueError(f"labels that are no organ of TotalSegmentator: {named}")
    return table
