"""`fvae augment --add-findings`: an nnU-Net dataset with findings drawn into its CTs.

Every training case appears as it is, and once more for each finding, which is placed in its lungs
and drawn by a generator; the other voxels are the CT's own. The label of such a case is that of the
original with the finding as one more class, or as the class of that name. `fvae/NAME.json` tells
how a case was made. It is written last, so a run that is interrupted goes on with the cases that
lack it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.batch.nnunet import (
    FOLDS,
    Case,
    Dataset,
    check_folder_name,
    check_same_request,
    content_of,
    is_outdated,
    link,
    link_test_cases,
    splits,
)
from fvae_deploy.batch.run import Begin, silent
from fvae_deploy.errors import ConditionError, UsageError, VolumeError
from fvae_deploy.export.generator import Finding, GeneratorManifest
from fvae_deploy.generation.given import PLACED
from fvae_deploy.generation.labels import frames_of, labels_of
from fvae_deploy.generation.lesions import lesion_of
from fvae_deploy.generation.networks import MODEL, Networks
from fvae_deploy.generation.options import GenerationOptions
from fvae_deploy.generation.pipeline import generate
from fvae_deploy.generation.presets import dataset_labels
from fvae_deploy.organs import ORGANS
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import write_json
from fvae_deploy.volume.open import create_volume, open_volume

NOTES = "fvae"  # folder of the notes on how cases were made


@dataclass(frozen=True, kw_only=True)
class FindingOptions:
    """What is added to every case, and where its organs come from."""

    findings: Sequence[str]
    """Lesions in words, such as "nodule 20mm"; each gives a further case."""
    organs: Path | None = None
    """Folder of organ labels with the names of the cases; None: the dataset's labels if they name
    the lungs, else TotalSegmentator finds them."""
    finding_class: str | None = None
    """Class of the findings in dataset.json; None: the name of each finding."""


def add_findings(
    source: Path,
    target: Path,
    options: RunOptions,
    wanted: FindingOptions,
    sampling: GenerationOptions | None = None,
    *,
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = silent,
) -> dict[str, Any]:
    """Write a dataset with findings added; returns counts, and the cases without room for one.

    Raises UsageError for names that do not fit, ConditionError for findings that the generator does
    not know or that fit into no case, and VolumeError for an invalid dataset or image.
    """
    dataset, sampling = _checked(source, target), sampling or GenerationOptions()
    known = GeneratorManifest.load(bundle_path(options.model or MODEL), verify=False).masks.findings
    found = [lesion_of(text, known).finding for text in wanted.findings]
    classes = _classes(dataset, found, wanted.finding_class)
    _check_names(dataset, len(found))
    request = {
        "dataset": str(source.resolve()),
        "findings": list(wanted.findings),
        "classes": [list(classes[each]) for each in found],
        "organs": wanted.organs and str(wanted.organs.resolve()),
        "sampling": {name: str(value) for name, value in vars(sampling).items()},
        "options": {name: str(value) for name, value in options.to_dict().items()},
    }
    check_same_request(target, request)
    (target / NOTES).mkdir(exist_ok=True)
    options = dataclasses.replace(options, overwrite=True)
    advance = progress("augment", len(dataset.cases) * len(found))
    views: dict[str, list[str]] = {}
    left_out: dict[str, str] = {}
    made = 0
    with Networks() as networks:
        for case in dataset.cases:
            _link_case(case, dataset, target)
            for number, text in enumerate(wanted.findings):
                name = _name(case.name, number)
                how = (text, classes[found[number]])
                try:
                    made += _add(
                        case, name, how, dataset, target, options, sampling, wanted, networks
                    )
                    views.setdefault(case.name, []).append(name)
                    say(name)
                except ConditionError as error:  # no lungs, no room, or a sample that fails
                    left_out[name] = str(error)
                    say(f"{name} left out: {error}")
                advance(1)
    if not views:
        raise ConditionError(
            "expected a case that a finding can be added to, found none; first: "
            + next(iter(left_out.values()))
        )
    link_test_cases(dataset, target)
    return _finish(dataset, target, wanted, classes, views, left_out) | {"made": made}


def _checked(source: Path, target: Path) -> Dataset:
    check_folder_name(source, target)
    dataset = Dataset.read(source)
    several = next((case for case in dataset.cases if len(case.images) > 1), None)
    if several is not None:
        raise UsageError(
            f"expected one image for each case with --add-findings, found {len(several.images)} of "
            f"{several.name}: use a dataset of one channel"
        )
    return dataset


def _check_names(dataset: Dataset, count: int) -> None:
    """Raise UsageError if a new case would have the name of another."""
    names = {case.name for case in dataset.cases}
    new = {_name(name, number) for name in names for number in range(count)}
    if names & new:
        raise UsageError(
            f"expected no case named {min(names & new)}, the name of a new one, found it in "
            f"{dataset.folder}: augment the original dataset"
        )


def _name(case: str, number: int) -> str:
    return f"{case}_finding{number}"


def _classes(
    dataset: Dataset, findings: Sequence[Finding], name: str | None
) -> dict[Finding, tuple[str, int]]:
    """Return the name and the number of each finding's class, an existing one or the next one."""
    labels = dataset.content["labels"]
    regions = [key for key, value in labels.items() if not isinstance(value, int)]
    if regions:
        raise UsageError(
            f"expected one number for each class in {dataset.folder}, found the region "
            f"{regions[0]}: use a dataset without regions"
        )
    numbers = {key.lower(): (key, int(value)) for key, value in labels.items()}
    classes = {}
    for finding in findings:
        own = name or "_".join(finding.name.lower().split())
        if own.lower() not in numbers:
            if "ignore" in numbers:
                raise UsageError(
                    f"expected no label ignore in {dataset.folder}, which has to be the last one, "
                    f"found it and no class {own}: name an existing one with --finding-class"
                )
            numbers[own.lower()] = own, max(number for _, number in numbers.values()) + 1
        classes[finding] = numbers[own.lower()]
        if classes[finding][1] == 0:
            raise UsageError(
                f"expected a class for findings, found {own}, the background: name another with "
                "--finding-class"
            )
    return classes


def _link_case(case: Case, dataset: Dataset, target: Path) -> None:
    link(case.label, target / "labelsTr" / (case.name + dataset.ending))
    link(case.images[0], target / "imagesTr" / f"{case.name}_0000{dataset.ending}")


def _add(
    case: Case,
    name: str,
    how: tuple[str, tuple[str, int]],
    dataset: Dataset,
    target: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    wanted: FindingOptions,
    networks: Networks,
) -> bool:
    """Make one case; returns False if it is there and newer than its sources."""
    (text, (class_name, number)), image = how, case.images[0]
    note = target / NOTES / f"{name}.json"
    output = target / "imagesTr" / f"{name}_0000{dataset.ending}"
    label = target / "labelsTr" / (name + dataset.ending)
    made = all(path.exists() for path in (note, output, label))
    if made and not any(is_outdated(note, each) for each in (image, case.label)):
        return False
    for path in (note, output, label):  # the note is the last to come and the first to go
        path.unlink(missing_ok=True)
    seed = sampling.seed + zlib.crc32(name.encode())
    mask, labels = _organs(case, dataset, wanted)
    with tempfile.TemporaryDirectory(prefix="fvae-added-") as folder:
        added = Path(folder) / "added.nii"
        report = generate(
            mask, output, options, dataclasses.replace(sampling, seed=seed, labels=labels),
            like=image, change=PLACED, lesions=text, keep_original=True, labels_out=added,
            networks=networks,
        )  # fmt: skip
        _merge(case.label, added, label, number)
    facts = {
        "case": case.name,
        "image": str(image.resolve()),
        "finding": text,
        "class": class_name,
        "label": number,
        "seed": seed,
        "change": {k: v for k, v in report["change"].items() if k != "labels"},
        "checks": report["checks"],
        "generator": report["generator"],
        "remarks": report["remarks"],
    }
    write_json(facts, note)
    return True


def _organs(
    case: Case, dataset: Dataset, wanted: FindingOptions
) -> tuple[Path | None, Path | None]:
    """Return the file of a case's organs and the names of its labels; None to segment the CT."""
    if wanted.organs is not None:
        path = wanted.organs / (case.name + dataset.ending)
        if not path.is_file():
            raise VolumeError(
                f"expected the organ labels of case {case.name} in {path}, found no file: add it, "
                "or leave --organs out"
            )
        return path, None
    with contextlib.suppress(ValueError):
        lungs = (ORGANS.get(n, "") for n in dataset_labels(dataset.content).values())
        if any(name.startswith("lung_") for name in lungs):
            return case.label, dataset.folder / "dataset.json"
    return None, None


def _merge(label: Path, added: Path, output: Path, number: int) -> None:
    """Write the label of a case with what was added as this number."""
    with contextlib.ExitStack() as stack:
        before, found = (
            stack.enter_context(contextlib.closing(open_volume(path))) for path in (label, added)
        )
        if before.geometry.shape != found.geometry.shape:
            raise VolumeError(
                f"expected a label of {found.geometry.shape} voxels as its image, found "
                f"{before.geometry.shape} in {label}: resample it"
            )
        writer = stack.enter_context(create_volume(output, before.geometry))
        pairs = zip(frames_of(before, 0), frames_of(found, 0), strict=True)
        for index, (old, new) in enumerate(pairs):
            labels = np.where(new > 0, number, labels_of(old, index, label))
            writer.write(labels.astype(np.int16)[None])


def _finish(
    dataset: Dataset,
    target: Path,
    wanted: FindingOptions,
    classes: dict[Finding, tuple[str, int]],
    views: dict[str, list[str]],
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Write what makes the folder a dataset; returns the counts."""
    count = sum(map(len, views.values()))
    content = content_of(
        dataset, target.name, count, f"findings of fvae added: {', '.join(wanted.findings)}"
    )
    content["labels"] = dataset.content["labels"] | dict(classes.values())
    if len(dataset.cases) >= FOLDS:
        names = [case.name for case in dataset.cases]
        write_json(splits(names, views), target / "splits_final.json")
    notes = sorted((target / NOTES).glob("*.json"))
    write_json(
        {"cases": {n.stem: json.loads(n.read_bytes()) for n in notes}, "left_out": left_out},
        target / "findings.json",
    )
    write_json(content, target / "dataset.json")
    return {
        "cases": content["numTraining"],
        "with_findings": count,
        "classes": dict(classes.values()),
        "left_out": left_out,
    }
