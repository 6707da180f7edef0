"""`fvae augment`: an nnU-Net dataset with reconstructions as an additional training view.

    Dataset001_Liver/                      Dataset101_LiverFvae/
      dataset.json                           dataset.json        numTraining, name
      imagesTr/case_0000.nii.gz     -->      imagesTr/case_0000.nii.gz          linked
      labelsTr/case.nii.gz                   imagesTr/case_fvae_0000.nii.gz     D(E(x))
                                             labelsTr/case.nii.gz, case_fvae.nii.gz   linked

With `instead`, the dataset has the reconstructions only, under the cases' own names. Linked files
are hard links where the file system allows it, else copies. An existing file is kept unless its
source is newer, so an interrupted run can continue. `dataset.json` is written last: without it
nnU-Net does not accept a dataset. `splits_final.json` keeps a scan and its reconstruction in one
fold. A dataset of version 1 (`modality`, and a list `training`) gives one of version 2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.api import reconstruct
from fvae_deploy.batch.run import Begin, silent
from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import write_json
from fvae_deploy.volume.publish import hidden, publish_file, recover

FOLDS = 5  # in nnU-Net's cross-validation
SUFFIX = "_fvae"  # at the end of a reconstructed case's name
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
_VERSION_1 = ("modality", "training", "numTest", "test", "tensorImageSize", "evaluationClass")


@dataclass(frozen=True)
class Case:
    """One training case: its images, one per channel, and its label."""

    name: str
    images: tuple[Path, ...]
    label: Path


@dataclass(frozen=True)
class Dataset:
    """A dataset in nnU-Net's format, version 2; one of version 1 is converted as it is read."""

    folder: Path
    content: dict[str, Any]  # of dataset.json, version 2
    cases: tuple[Case, ...]

    @property
    def ending(self) -> str:
        """File extension of the images and labels."""
        return str(self.content["file_ending"])

    @property
    def is_unnumbered(self) -> bool:
        """Return whether images have the names of their cases, without a number of the channel."""
        return all(case.images[0].name == case.name + self.ending for case in self.cases)

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Read a dataset; raises VolumeError if the folder is not one, or lacks files."""
        path = folder / "dataset.json"
        try:
            content = json.loads(path.read_bytes())
            if "modality" in content and "channel_names" not in content:
                content = _version_2(folder, content)
            channels, ending = content["channel_names"], content["file_ending"]
            count = len(channels)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found = getattr(error, "strerror", None) or f"{type(error).__name__} {error}"
            raise VolumeError(
                f"expected nnU-Net's dataset.json in {folder}, found {found}: pass a "
                "folder named DatasetXXX_NAME, or TaskXXX_NAME of version 1"
            ) from None
        if ending not in ENDINGS:
            raise VolumeError(
                f"expected the file ending {' or '.join(ENDINGS)} in {path}, found {ending!r}: "
                "convert the dataset to NIfTI"
            )
        others = [str(name) for name in channels.values() if str(name).upper() != "CT"]
        if others:
            raise VolumeError(
                f"expected CT as every channel in {path}, found {others[0]}: use CT datasets only"
            )
        cases = tuple(_listed_cases(folder, content) or _labelled_cases(folder, str(ending), count))
        if not cases:
            raise VolumeError(
                f"expected training cases in {folder}/imagesTr, found none: check the path"
            )
        for case in cases:
            for file in (*case.images, case.label):
                if not file.is_file():
                    raise VolumeError(f"expected {file} of case {case.name}, found no file: add it")
        if len(cases) != content.get("numTraining"):
            raise VolumeError(
                f"expected {content.get('numTraining')} cases, the numTraining of {path}, found "
                f"{len(cases)}: correct numTraining or add the cases"
            )
        return cls(folder, content, cases)


def augment(
    source: Path,
    target: Path,
    options: RunOptions,
    *,
    instead: bool = False,
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = silent,
) -> dict[str, Any]:
    """Write a dataset with reconstructions beside the originals, or `instead` of them.

    Returns counts and seconds. Raises UsageError for names that nnU-Net does not accept, and
    VolumeError for an invalid dataset or image.
    """
    dataset = _checked(source, target, instead)
    check_same_request(
        target,
        {
            "dataset": str(source.resolve()),
            "instead": instead,
            "options": {name: str(value) for name, value in options.to_dict().items()},
        },
    )
    options = dataclasses.replace(options, overwrite=True)  # if the source has changed
    advance = progress("augment", sum(len(case.images) for case in dataset.cases))
    count, seconds = 0, 0.0
    for case in dataset.cases:
        name = case.name if instead else case.name + SUFFIX
        link(case.label, target / "labelsTr" / (name + dataset.ending))
        if not instead:
            link(case.label, target / "labelsTr" / (case.name + dataset.ending))
        for channel, image in enumerate(case.images):
            if not instead:
                link(image, target / "imagesTr" / f"{case.name}_{channel:04}{dataset.ending}")
            output = target / "imagesTr" / f"{name}_{channel:04}{dataset.ending}"
            if is_outdated(output, image):
                say(output.name)
                seconds += reconstruct(image, output, options)["seconds"]["total"]
                count += 1
            advance(1)
    link_test_cases(dataset, target)
    note = "reconstructions of fvae " + ("alone" if instead else "beside the originals")
    content = content_of(dataset, target.name, 0 if instead else len(dataset.cases), note)
    if not instead and len(dataset.cases) >= FOLDS:
        names = [case.name for case in dataset.cases]
        views = {name: [name + SUFFIX] for name in names}
        write_json(splits(names, views), target / "splits_final.json")
    write_json(content, target / "dataset.json")
    return {"cases": content["numTraining"], "reconstructed": count, "seconds": round(seconds, 2)}


def check_folder_name(source: Path, target: Path) -> None:
    """Raise UsageError for an output that nnU-Net would not accept, or that is the dataset."""
    if not re.fullmatch(r"Dataset\d{3}_\S+", target.name):
        raise UsageError(
            f"expected an output named DatasetXXX_NAME, found {target.name}: rename it"
        )
    if source.resolve() == target.resolve():
        raise UsageError(f"expected an output other than the dataset, found {target}: rename it")


def _checked(source: Path, target: Path, instead: bool) -> Dataset:
    """Read the dataset; raises UsageError if names of the output are invalid or taken."""
    check_folder_name(source, target)
    dataset = Dataset.read(source)
    names = {case.name for case in dataset.cases}
    clashing = sorted(name for name in names if not instead and name + SUFFIX in names)
    if clashing:
        raise UsageError(
            f"expected no case named {clashing[0]}{SUFFIX}, the name of {clashing[0]}'s "
            f"reconstruction, found one in {source}: augment the original dataset"
        )
    return dataset


def link_test_cases(dataset: Dataset, target: Path) -> None:
    """Link images and labels for testing."""
    for folder in ("imagesTs", "labelsTs"):
        if (dataset.folder / folder).is_dir():
            (target / folder).mkdir(exist_ok=True)
            for file in sorted((dataset.folder / folder).iterdir()):
                if file.name.startswith("."):  # as macOS leaves them in archives
                    continue
                name, ending = file.name, dataset.ending
                if folder == "imagesTs" and name.endswith(ending) and dataset.is_unnumbered:
                    name = f"{name.removesuffix(ending)}_0000{ending}"
                link(file, target / folder / name)


def splits(names: list[str], views: Mapping[str, Sequence[str]]) -> list[dict[str, list[str]]]:
    """Divide cases into nnU-Net's own folds; each trains on its cases and their `views`.

    Every fold validates on the same cases as without views, never on a view, so results can be
    compared. nnU-Net's own split would validate on views of scans that it trained on.
    """
    names = sorted(names)
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)  # nnU-Net's seed and generator
    folds = []
    for validation in np.array_split(order, FOLDS):
        train = [name for n, name in enumerate(names) if n not in validation]
        validated = [name for n, name in enumerate(names) if n in validation]
        further = [view for name in train for view in views.get(name, ())]
        folds.append({"train": train + further, "val": validated})
    return folds


def is_outdated(target: Path, source: Path) -> bool:
    """Return whether a file is missing or older than its source, so must be written."""
    return not target.exists() or target.stat().st_mtime_ns < source.stat().st_mtime_ns


def content_of(dataset: Dataset, name: str, further: int, note: str) -> dict[str, Any]:
    """Return the new dataset.json with so many further cases.

    nnU-Net finds the cases by their names, so none is listed.
    """
    content = {key: value for key, value in dataset.content.items() if key != "dataset"}
    description = "; ".join(filter(None, [str(content.get("description", "")), note]))
    return content | {
        "name": name.partition("_")[2],
        "numTraining": len(dataset.cases) + further,
        "description": description,
    }


def _listed_cases(folder: Path, content: dict[str, Any]) -> list[Case]:
    """Return the cases that dataset.json lists itself, with paths relative to it."""
    listed = content.get("dataset") or {}
    return [
        Case(name, tuple(folder / image for image in entry["images"]), folder / entry["label"])
        for name, entry in listed.items()
    ]


def _version_2(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a dataset.json of version 1, as nnU-Net itself does.

    Version 1 lists the label of each case and an image without the number of its channel. Files
    are named with that number where nnU-Net's version 1 wrote them, without it in the Medical
    Segmentation Decathlon.
    """
    labels = {name: int(value) for value, name in content["labels"].items()}
    if not content["training"] or len(labels) < len(content["labels"]):
        raise ValueError("no training cases, or one name for two labels")
    first = str(content["training"][0]["label"])
    ending = next((ending for ending in ENDINGS if first.endswith(ending)), Path(first).suffix)
    dataset = {}
    for entry in content["training"]:
        image, label = Path(entry["image"]), Path(entry["label"])
        stem = image.name.removesuffix(ending)
        numbered = [
            str(image.with_name(f"{stem}_{n:04}{ending}")) for n in range(len(content["modality"]))
        ]
        single = len(numbered) == 1 and not (folder / numbered[0]).exists()
        name = label.name.removesuffix(ending)
        dataset[name] = {"images": [str(image)] if single else numbered, "label": str(label)}
    kept = {key: value for key, value in content.items() if key not in _VERSION_1}
    return kept | {
        "channel_names": content["modality"],
        "labels": labels,
        "file_ending": ending,
        "dataset": dataset,
    }


def _labelled_cases(folder: Path, ending: str, channels: int) -> list[Case]:
    """Return the cases by the names of their labels."""
    names = sorted(
        path.name.removesuffix(ending)
        for path in (folder / "labelsTr").glob(f"*{ending}")
        if not path.name.startswith(".")
    )
    return [
        Case(
            name,
            tuple(folder / "imagesTr" / f"{name}_{n:04}{ending}" for n in range(channels)),
            folder / "labelsTr" / (name + ending),
        )
        for name in names
    ]


def link(source: Path, target: Path) -> None:
    """Link a file under another name, or copy it where a hard link is not possible."""
    if not is_outdated(target, source):
        return
    recover(target)
    temporary = hidden(target)
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        publish_file(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # a rename keeps a link to the same file


def check_same_request(target: Path, request: dict[str, Any]) -> None:
    """Store the request in the folder; raise UsageError if the folder has other content."""
    note = target / "fvae.json"
    if target.exists() and any(target.iterdir()):
        try:
            earlier = json.loads(note.read_bytes())
        except (OSError, ValueError):
            raise UsageError(
                "expected a new folder, or the output of an interrupted fvae augment, found "
                f"{target}: choose another folder"
            ) from None
        if earlier != request:
            raise UsageError(
                f"expected {target} to come from the same dataset and options, found {earlier}: "
                "choose another folder"
            )
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True, exist_ok=True)
    write_json(request, note)
