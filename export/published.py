"""Facts about the published generators that their checkpoints do not hold.

There are two, with the same network: `multi-disease` was trained with masks of findings, `healthy`
without. They divide the labels of a mask by different numbers, so one cannot stand in for the
other. See docs/generation.md for how they were found.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fvae_deploy.organs import PUBLISHED_FINDINGS

SCALE = 1.52  # of image and mask latents
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
OFFSET = 100  # added to the number of a finding
LARGEST = 249  # label below those of findings
# The published text of a normal scan is its whole report. This one is ours, in their style.
NORMAL_REPORT = (
    "Trachea and both main bronchi are open. No pathological wall thickening was detected in the "
    "esophagus. Heart size and the diameters of the mediastinal great vessels are normal. "
    "Pericardial and pleural effusion was not detected. No lymph node in pathological size was "
    "detected in the mediastinum, at the hilum or in the axilla. Aeration of both lungs is normal. "
    "No nodule, mass or infiltration was detected in either lung. No lytic or destructive lesion "
    "was detected in the bones. Thorax CT examination within normal limits."
)


def _palette(divisor: int, findings: dict[int, str]) -> dict[str, float]:
    """Return the HU of every label: label / divisor of the range from -1000 to 1000 HU.

    Computed in float32 as in the published code, so that masks equal its masks bit for bit.
    """
    labels = [*range(LARGEST + 1), *(number + OFFSET for number in findings)]
    return {
        str(n): float(np.float32(n / divisor) * np.float32(2) - np.float32(1)) * 1000
        for n in labels
    }


def _generator(divisor: int, findings: dict[int, str]) -> dict[str, Any]:
    return {
        "schedule": SCHEDULE,
        "palette": _palette(divisor, findings),
        "finding_offset": OFFSET,
        "classes": {str(number): name for number, name in findings.items()},
        "body": True,
        "orientation": "",
        "plane": [512, 512],
        "window": 17,
        "vae": "leanvae16",
        "sampler": "ddim",
        "steps": 20,
        "eta": 1.0,
        "findings": NORMAL_REPORT,
        "centred_noise": False,
        "as_published": ["stretch", "text"],
        "trained_without_text": False,
    }


MULTI_DISEASE, HEALTHY = "multi-disease", "healthy"
DIVISORS = {MULTI_DISEASE: 300, HEALTHY: 400}
GENERATORS = {
    MULTI_DISEASE: _generator(DIVISORS[MULTI_DISEASE], PUBLISHED_FINDINGS),
    HEALTHY: _generator(DIVISORS[HEALTHY], {}),
}
# What the file of another generator, which has a palette of its own, need not say.
OTHERS = {
    **GENERATORS[MULTI_DISEASE],
    "findings": "No finding.",
    "body": False,
    "as_published": [],
    "trained_without_text": True,
}
del OTHERS["classes"]
# Names in the published configurations that only one of the two has.
TOLD_BY = {"ct_clip_data_inference_eval": MULTI_DISEASE, "ct_clip_data_evaluation": HEALTHY}
