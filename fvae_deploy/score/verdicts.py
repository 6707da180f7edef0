"""What networks of the user say about CTs: cosines of image and text, the AUC of 18 findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fvae_deploy.organs import FINDINGS
from fvae_deploy.score.distances import Floats, Statistic, Weights, mean_of, with_mean
from fvae_deploy.score.examine import Seen
from fvae_deploy.score.rows import HIGHER, Row, Rows

Cases = Sequence[Seen]
COSINE = (-1.0, 1.0)


def similarity_rows(real: Cases, generated: Cases, rounds: int) -> Iterator[Row]:
    """Yield the mean cosine of image and text."""
    usual, own = (
        np.array([[one.judgement.similarity] for one in side
                  if one.judgement.similarity is not None], np.float64)
        for side in (real, generated)
    )  # fmt: skip
    if len(own):
        rows = Rows("CLIP score", "", HIGHER, (len(usual), len(own)), limits=COSINE)
        yield from rows.of_generated([""], mean_of(own), mean_of(usual.reshape(-1, 1)), rounds)


def auc_rows(real: Cases, generated: Cases, rounds: int) -> Iterator[Row]:
    """Yield the area under the curve of each finding that some CTs have and others lack."""
    sides = [[one for one in side if one.judgement.probabilities is not None]
             for side in (real, generated)]  # fmt: skip
    if not sides[1]:
        return
    names = list(FINDINGS.values())
    usual, own = (with_mean(auc(*_scored(side))) for side in sides)
    rows = Rows("AUC of findings", "", HIGHER, (len(sides[0]), len(sides[1])))
    yield from rows.of_generated(["", *names], own, usual, rounds)


def _scored(cases: Cases) -> tuple[Floats, Floats]:
    """Return probabilities and truth [cases, 18], NaN where the table has no entry."""
    shape = len(cases), len(FINDINGS)
    scores = [one.judgement.probabilities for one in cases]
    truth = [[one.judgement.truth.get(name, np.nan) for name in FINDINGS.values()] for one in cases]
    return np.array(scores, np.float64).reshape(shape), np.array(truth, np.float64).reshape(shape)


def auc(scores: Floats, truth: Floats) -> Statistic:
    """Return the AUC of each column by the weights of the second set.

    The share of pairs of a CT with the finding and one without in which the first has the higher
    score; ties count half. NaN where there are no such pairs.
    """

    def areas(_: Weights, weight: Weights) -> Floats:
        found = np.full(scores.shape[1], np.nan)
        for k, (score, true) in enumerate(zip(scores.T, truth.T, strict=True)):
            has, lacks = (true == 1) * weight, (true == 0) * weight
            pairs = has.sum() * lacks.sum()
            if pairs > 0:
                above = (score[:, None] > score) + 0.5 * (score[:, None] == score)
                found[k] = has @ above @ lacks / pairs
        return found

    return areas
