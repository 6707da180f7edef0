"""Names of label numbers: organs in a segmentation, and findings in a disease mask.

The organs are the 117 classes of TotalSegmentator v2 (task "total"). FINDINGS are the 18 of
CT-RATE, which phantoms and `tiny-ldm` use; the published generator has PUBLISHED_FINDINGS.
"""

from __future__ import annotations

from collections.abc import Iterator

_SIDES = ("left", "right")
_SPINE = [f"vertebrae_{part}{n}" for part, last in (("L", 5), ("T", 12), ("C", 7))
          for n in range(last, 0, -1)]  # fmt: skip


def _names() -> Iterator[str]:
    yield from ("spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach")
    yield from ("pancreas", "adrenal_gland_right", "adrenal_gland_left")
    yield from ("lung_upper_lobe_left", "lung_lower_lobe_left")
    yield from ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right")
    yield from ("esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon")
    yield from ("urinary_bladder", "prostate", "kidney_cyst_left", "kidney_cyst_right")
    yield from ("sacrum", "vertebrae_S1", *_SPINE)
    yield from ("heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk")
    yield from ("subclavian_artery_right", "subclavian_artery_left")
    yield from ("common_carotid_artery_right", "common_carotid_artery_left")
    yield from ("brachiocephalic_vein_left", "brachiocephalic_vein_right")
    yield from ("atrial_appendage_left", "superior_vena_cava", "inferior_vena_cava")
    yield "portal_vein_and_splenic_vein"
    for pair in ("iliac_artery", "iliac_vena", "humerus", "scapula", "clavicula", "femur", "hip"):
        yield from (f"{pair}_{side}" for side in _SIDES)
    yield "spinal_cord"
    for pair in ("gluteus_maximus", "gluteus_medius", "gluteus_minimus", "autochthon", "iliopsoas"):
        yield from (f"{pair}_{side}" for side in _SIDES)
    yield from ("brain", "skull")
    yield from (f"rib_{side}_{n}" for side in _SIDES for n in range(1, 13))
    yield from ("sternum", "costal_cartilages")


ORGANS: dict[int, str] = dict(enumerate(_names(), start=1))

FINDINGS: dict[int, str] = dict(
    enumerate(
        (
            "Medical material",
            "Arterial wall calcification",
            "Cardiomegaly",
            "Pericardial effusion",
            "Coronary artery wall calcification",
            "Hiatal hernia",
            "Lymphadenopathy",
            "Emphysema",
            "Atelectasis",
            "Lung nodule",
            "Lung opacity",
            "Pulmonary fibrotic sequela",
            "Pleural effusion",
            "Mosaic attenuation pattern",
            "Peribronchial thickening",
            "Consolidation",
            "Bronchiectasis",
            "Interlobular septal thickening",
        ),
        start=1,
    )
)

# As the lists of cases beside the published code number them; 158 and 160 do not occur there.
PUBLISHED_FINDINGS: dict[int, str] = {
    150: "Atelectasis, consolidation",
    151: "Bronchial wall thickening",
    152: "Bronchiectasis",
    153: "Emphysema",
    154: "Groundglass opacity",
    155: "Honeycombing",
    156: "Linear",
    157: "Micronodules",
    159: "Pleural effusion or thickening",
    161: "Pulmonary nodules/masses",
    162: "Septal thickening",
}


def organ_name(label: int) -> str:
    """Return the name of a label, for example "label 205" if TotalSegmentator does not use it."""
    return ORGANS.get(label, f"label {label}")


def organ_label(name: str) -> int:
    """Return the label number of an organ; raises KeyError for an unknown name."""
    return _LABELS[name]


_LABELS = {name: label for label, name in ORGANS.items()}


def finding_label(name: str) -> int:
    """Return the label number of a finding; raises KeyError for an unknown name."""
    return _FINDING_LABELS[name]


_FINDING_LABELS = {name: label for label, name in FINDINGS.items()}
