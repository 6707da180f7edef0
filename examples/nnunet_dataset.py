r"""Make an nnU-Net dataset of a folder of CTs and a folder of organ label maps.

    python examples/nnunet_dataset.py scans/ organs/ -o Dataset001_Liver --organ liver

A CT and its label map have the same name and are `.nii.gz`. Of the label map, which has
TotalSegmentator's numbers, the organs that are named become labels 1, 2, ... of the dataset.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np

from fvae_deploy.organs import ORGANS


def write_case(ct: Path, organs: Path, numbers: list[int], output: Path) -> None:
    """Copy a CT, and write the label map that has `numbers[i]` as label i + 1."""
    shutil.copy(ct, output / "imagesTr" / ct.name.replace(".nii.gz", "_0000.nii.gz"))
    image = nibabel.load(organs)
    old = np.asarray(image.dataobj)
    new = np.zeros(old.shape, np.uint8)
    for label, number in enumerate(numbers, 1):
        new[old == number] = label
    nibabel.save(nibabel.Nifti1Image(new, image.affine), output / "labelsTr" / ct.name)


def main(arguments: list[str] | None = None) -> None:
    """Write the dataset of all CTs that have a label map."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scans", type=Path)
    parser.add_argument("organs", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="DatasetXXX_NAME")
    parser.add_argument("--organ", action="append", required=True, choices=sorted(ORGANS.values()))
    options = parser.parse_args(arguments)
    by_name = {name: number for number, name in ORGANS.items()}
    cases = sorted(options.scans.glob("*.nii.gz"))
    for name in ("imagesTr", "labelsTr"):
        (options.output / name).mkdir(parents=True)
    for ct in cases:
        numbers = [by_name[name] for name in options.organ]
        write_case(ct, options.organs / ct.name, numbers, options.output)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0} | {name: i for i, name in enumerate(options.organ, 1)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (options.output / "dataset.json").write_text(json.dumps(content, indent=1))
    print(f"{options.output}: {len(cases)} cases, labels {', '.join(options.organ)}")


if __name__ == "__main__":
    main()
