"""The palette of `tiny-ldm`: the gray value of every organ and finding in a mask, in HU.

The published generator paints label n as `n / 300`, so organs with neighbouring
numbers look almost the same. A miniature needs contrast. Organs are spread over the whole range in
the order of their density, so that a blurred edge between two of them does not look like a third
organ of a very different kind. Unlabelled voxels, which are air outside the body and tissue inside,
have a value between, at which the lungs stand out clearly.
"""

from __future__ import annotations

from fvae_deploy.organs import FINDINGS, ORGANS

BACKGROUND = -420.0
OFFSET = 200  # added to findings; the published 100 would collide with the numbers of the ribs

GROUPS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (-1000, ("lung",)),
    (-900, ("trachea",)),
    (-800, ("esophagus",)),
    (-720, ("stomach",)),
    (-640, ("small_bowel", "duodenum")),
    (-560, ("colon",)),
    (-300, ("gallbladder", "urinary_bladder", "kidney_cyst")),
    (-220, ("pancreas", "prostate", "thyroid_gland")),
    (-140, ("adrenal_gland",)),
    (-60, ("kidney",)),
    (20, ("spleen",)),
    (90, ("liver",)),
    (160, ("heart", "atrial_appendage")),
    (
        230,
        (
            "pulmonary_vein",
            "brachiocephalic_vein",
            "superior_vena_cava",
            "inferior_vena_cava",
            "portal_vein",
            "iliac_vena",
        ),
    ),
    (
        300,
        ("aorta", "brachiocephalic_trunk", "subclavian_artery", "common_carotid", "iliac_artery"),
    ),
    (370, ("gluteus", "autochthon", "iliopsoas")),
    (440, ("spinal_cord", "brain")),
    (510, ("costal_cartilages",)),
    (580, ("sternum",)),
    (650, ("hip", "femur", "humerus", "scapula", "clavicula", "skull")),
    (720, ("rib",)),
    (800, ("vertebrae",)),
    (870, ("sacrum",)),
)


def palette() -> dict[int, float]:
    """Return the HU of every label: 0, the organs, and findings from OFFSET on."""

    def density(name: str) -> float:
        return next(hu for hu, stems in GROUPS if name.startswith(stems))

    organs = {label: float(density(name)) for label, name in ORGANS.items()}
    findings = {OFFSET + label: -400.0 + 75 * label for label in FINDINGS}
    return {0: BACKGROUND, **organs, **findings}
