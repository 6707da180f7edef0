"""All metrics of two sets of CTs: each a row with its value, interval and what real CTs score."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fvae_deploy.score.distances import (
    Floats,
    Statistic,
    Vectors,
    frechet,
    kernel,
    lacks_rank,
    mean_difference,
    mean_of,
    together,
    wasserstein,
    with_mean,
)
from fvae_deploy.score.examine import Seen
from fvae_deploy.score.histograms import BIN
from fvae_deploy.score.intervals import estimates, floors
from fvae_deploy.score.nearest import Near, diversity, nearness
from fvae_deploy.score.planes import PLANES
from fvae_deploy.score.rows import HIGHER, LOWER, ONE, POSITIVE, ZERO, Row, Rows
from fvae_deploy.score.verdicts import auc_rows, similarity_rows

Cases = Sequence[Seen]
LARGE = 512  # vectors and features: a Fréchet distance of more takes seconds
FEW_DRAWS = 40  # of such ones


def metrics(
    real: Cases,
    generated: Cases,
    distances: Near,
    names: dict[str, str],
    rounds: int,
    begin: Callable[[str, int], Callable[[int], None]],
) -> list[Row]:
    """Return the rows of all metrics that apply, in the order of the page.

    `names` are those of the networks: "latents" and, where there are some, "pictures" and "clip".
    """
    parts: list[Callable[[], Iterator[Row]]] = [
        lambda: _features(real, generated, "latents", names, rounds),
        lambda: _features(real, generated, "pictures", names, rounds),
        lambda: _clips(real, generated, names, rounds),
        lambda: _hounsfield(real, generated, rounds),
        lambda: _noise(real, generated, rounds),
        lambda: _adherence(real, generated, rounds),
        lambda: _nearness(distances, rounds),
        lambda: similarity_rows(real, generated, rounds),
        lambda: auc_rows(real, generated, rounds),
    ]
    tick = begin("metrics", len(parts))
    rows: list[Row] = []
    for part in parts:
        rows += part()
        tick(1)
    return rows


TITLES = {
    "latents": ("Fréchet distance of latents", "kernel distance of latents"),
    "pictures": ("FID in three planes", "KID in three planes"),
    "clip": ("FVD", "kernel video distance"),
}


def _features(
    real: Cases, generated: Cases, kind: str, names: dict[str, str], rounds: int
) -> Iterator[Row]:
    """Yield Fréchet and kernel distance of slices: the mean of three planes, and each plane."""
    if kind not in names:
        return
    sides = [
        [[one.features[f"{kind} {plane}"] for one in side] for plane in PLANES]
        for side in (real, generated)
    ]
    yield from _distances(kind, names[kind], sides, PLANES, rounds)


def _clips(real: Cases, generated: Cases, names: dict[str, str], rounds: int) -> Iterator[Row]:
    """Yield FVD and the kernel distance of clips, of the CTs that are long enough."""
    if "clip" not in names:
        return
    sides = [[[one.features["clip"] for one in side if "clip" in one.features]]
             for side in (real, generated)]  # fmt: skip
    if min(len(side[0]) for side in sides) >= 2:
        yield from _distances("clip", names["clip"], sides, (), rounds)


def _distances(
    kind: str, name: str, sides: Sequence[Sequence[Vectors]], planes: Sequence[str], rounds: int
) -> Iterator[Row]:
    counts = len(sides[0][0]), len(sides[1][0])
    short = any(lacks_rank(vectors) for side in sides for vectors in side)
    notes = ["fewer vectors than features"] if short else []
    draws = rounds
    if max(min(sum(map(len, v)), v[0].shape[1]) for side in sides for v in side) > LARGE:
        draws = min(rounds, FEW_DRAWS)
        notes += [f"{draws} draws"] if draws < rounds else []
    for title, make, limits in zip(
        TITLES[kind], (frechet, kernel), (POSITIVE, (-math.inf, math.inf)), strict=True
    ):
        statistic = together([make(a, b) for a, b in zip(*sides, strict=True)])
        itself = together([make(a, a) for a in sides[0]])
        if planes:
            statistic, itself = with_mean(statistic), with_mean(itself)
        mine = make is frechet
        rows = Rows(f"{title} ({name})", "", LOWER, counts, "; ".join(notes) if mine else "")
        found = estimates(statistic, counts, draws if mine else rounds, limits=limits)
        yield from rows.of(["", *planes], found, floors(itself, counts[0]))


def _hounsfield(real: Cases, generated: Cases, rounds: int) -> Iterator[Row]:
    """Yield distances of the HU of organs and of tissues, and differences of their means."""
    for title, field in (("HU by organ", "organs"), ("HU by tissue", "tissues")):
        first, second = ([getattr(one, field) for one in side] for side in (real, generated))
        names = [
            name
            for name in dict.fromkeys(name for one in first for name in one)
            if min(sum(name in one for one in side) for side in (first, second)) >= 2
        ]
        if not names:
            continue
        a, b = (_histograms(side, names) for side in (first, second))
        counts = len(real), len(generated)
        rows = Rows(f"{title}: Wasserstein distance", "HU", LOWER, counts)
        found = estimates(with_mean(wasserstein(a, b, BIN)), counts, rounds, limits=POSITIVE)
        usual = floors(with_mean(wasserstein(a, a, BIN)), counts[0])
        yield from rows.of(["", *names], found, usual)
        means = [_means(side) for side in (a, b)]
        rows = Rows(f"{title}: difference of means", "HU", ZERO, counts)
        yield from rows.of(names, estimates(mean_difference(*means), counts, rounds), None)


def _histograms(cases: Sequence[dict[str, Floats]], names: Sequence[str]) -> Floats:
    """Return counts [cases, organs, bins], zeros where a case lacks an organ."""
    bins = len(next(iter(next(case for case in cases if case).values())))
    return np.array([[case.get(name, np.zeros(bins)) for name in names] for case in cases])


def _means(histograms: Floats) -> Floats:
    """Return the mean HU [cases, organs] but for a constant, NaN where an organ is absent."""
    sizes = histograms.sum(axis=2)
    places = np.arange(histograms.shape[2]) * BIN
    means: Floats = (histograms @ places) / np.where(sizes > 0, sizes, np.nan)
    return means


def _noise(real: Cases, generated: Cases, rounds: int) -> Iterator[Row]:
    """Yield the difference of the noise in soft tissue, and the distance of its spectra."""
    first, second = (
        np.array([[one.noise] for one in side if one.noise is not None])
        for side in (real, generated)
    )
    if min(len(first), len(second)) >= 2:
        counts = len(first), len(second)
        note = f"real CTs: {first.mean():.3g} HU"
        found = estimates(mean_difference(first, second), counts, rounds)
        yield from Rows("noise: difference of means", "HU", ZERO, counts, note).of(
            [""], found, None
        )
    a, b = (np.array([one.spectrum for one in side if one.spectrum is not None])
            for side in (real, generated))  # fmt: skip
    if min(len(a), len(b)) >= 2:
        counts = len(a), len(b)
        found = estimates(_length(mean_difference(a, b)), counts, rounds, limits=POSITIVE)
        halves = floors(_length(mean_difference(a, a)), counts[0])
        yield from Rows("noise: distance of spectra", "HU", LOWER, counts).of([""], found, halves)


def _length(statistic: Statistic) -> Statistic:
    """Return the length of a statistic's vector."""
    return lambda *weights: float(np.linalg.norm(statistic(*weights)))


def _adherence(real: Cases, generated: Cases, rounds: int) -> Iterator[Row]:
    """Yield Dice, NSD and the shares of HU that fit, of generated CTs and of real ones."""
    sides = [[one.adherence for one in side if one.adherence is not None]
             for side in (real, generated)]  # fmt: skip
    counts = len(sides[0]), len(sides[1])
    if not counts[1]:
        return
    for title, kind in (("Dice", "dice"), ("NSD at 2 mm", "nsd"), ("HU that fit", "fits")):
        names = list(dict.fromkeys(name for one in sides[1] for name in one[kind]))
        if not names:
            continue
        usual, own = (_table([one[kind] for one in side], names) for side in sides)
        yield from Rows(f"mask adherence: {title}", "", HIGHER, counts).of_generated(
            ["", *names], with_mean(mean_of(own)), with_mean(mean_of(usual)), rounds
        )


def _table(cases: Sequence[dict[str, float]], names: Sequence[str]) -> Floats:
    """Return values [cases, names], NaN where a case lacks one."""
    values = [[case.get(name, math.nan) for name in names] for case in cases]
    return np.array(values, np.float64).reshape(len(cases), len(names))


def _nearness(distances: Near, rounds: int) -> Iterator[Row]:
    counts = len(distances.real), len(distances.generated)
    found = estimates(diversity(distances), counts, rounds, limits=POSITIVE)
    yield from Rows("diversity", "of the real CTs'", ONE, counts).of([""], found, [1.0])
    found = estimates(nearness(distances), counts, rounds, limits=POSITIVE, fixed=True)
    title = "distance to the nearest real CT"
    yield from Rows(title, "of the real CTs'", ONE, counts).of([""], found[:1], [1.0])
    title = "share near a real CT"
    yield from Rows(title, "", LOWER, counts).of([""], found[1:], [0.05])
