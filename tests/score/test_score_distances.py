"""The distances of fvae score against other implementations on the same features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from fvae_deploy.score.distances import (
    frechet,
    kernel,
    lacks_rank,
    mean_difference,
    wasserstein,
    with_mean,
)
from fvae_deploy.score.intervals import centred, estimates, floors
from fvae_deploy.score.nearest import closest, diversity, near, nearness, repeated
from fvae_deploy.score.verdicts import auc


def cases(count, vectors, size, seed, shift=0.0, scale=1.0):
    """Features of cases whose vectors are alike, as slices of one CT are."""
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((size, size)) * scale
    centres = random.standard_normal((count, 1, size))
    rows = centres + 0.5 * random.standard_normal((count, vectors, size))
    return [*(rows @ mixing + shift)]


def whole(statistic, first, second):
    return statistic(np.ones(len(first)), np.ones(len(second)))


def published(a, b):
    """The Fréchet distance as scripts compute it, with scipy's matrix square root."""
    a, b = np.concatenate(a), np.concatenate(b)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linalg.LinAlgWarning)  # of covariances without full rank
        root = linalg.sqrtm(first @ second)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(mean + np.trace(first + second - 2 * np.real(root)))


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(4, 9),
    size=st.integers(1, 6),
    shift=st.floats(-2, 2),
)
def test_frechet_is_that_of_scipys_matrix_root(seed, count, size, shift):
    a, b = cases(count, 3, size, seed), cases(count + 2, 4, size, seed + 1, shift, 1.4)
    expected = published(a, b) if size > 1 else None
    if expected is None:
        x, y = np.concatenate(a)[:, 0], np.concatenate(b)[:, 0]
        spread = x.std(ddof=1) - y.std(ddof=1)
        expected = (x.mean() - y.mean()) ** 2 + spread**2
    assert whole(frechet(a, b), a, b) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_frechet_is_that_of_monai():
    torch = pytest.importorskip("torch", reason="needs the export extra")
    pytest.importorskip("monai", reason="needs the dev extra")
    a, b = cases(12, 5, 8, 0), cases(9, 5, 8, 1, shift=0.3)
    pair = (torch.from_numpy(np.concatenate(side)) for side in (b, a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from monai.metrics import FIDMetric

        expected = float(FIDMetric()(*pair))
    assert whole(frechet(a, b), a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_holds_without_full_rank():
    """5 vectors of 40 features: in the plane of all vectors, the definition can be computed."""
    a, b = cases(5, 1, 40, 2), cases(5, 1, 40, 3, shift=0.1)
    basis = linalg.orth(np.concatenate([*a, *b]).T)
    expected = published([x @ basis for x in a], [x @ basis for x in b])
    assert whole(frechet(a, b), a, b) == pytest.approx(expected, rel=1e-4)
    assert lacks_rank(a)
    assert not lacks_rank(cases(5, 9, 40, 2))


def test_frechet_of_a_set_with_itself_is_0_and_of_one_vector_unknown():
    a = cases(6, 3, 5, 0)
    assert whole(frechet(a, a), a, a) == pytest.approx(0, abs=1e-8)
    assert np.isnan(frechet(a, a)(np.ones(6), np.zeros(6)))


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_weights_are_repeated_cases(seed):
    random = np.random.default_rng(seed)
    a, b = cases(6, 2, 3, seed), cases(5, 2, 3, seed + 1, 0.5)
    weights = [random.multinomial(n, np.full(n, 1 / n)).astype(float) for n in (6, 5)]
    again = [
        [case for case, n in zip(side, weight, strict=True) for _ in range(int(n))]
        for side, weight in zip((a, b), weights, strict=True)
    ]
    assert frechet(a, b)(*weights) == pytest.approx(published(*again), rel=1e-5, abs=1e-7)


def kernel_by_pairs(a, b):
    """The kernel distance pair by pair, without pairs of one case."""

    def value(x, y):
        return (x @ y / len(x) + 1) ** 3

    def mean(first, second, same):
        found = [
            value(x, y)
            for i, one in enumerate(first)
            for j, other in enumerate(second)
            if not (same and i == j)
            for x in one
            for y in other
        ]
        return np.mean(found)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def test_the_kernel_distance_is_that_of_all_pairs():
    a, b = cases(5, 3, 4, 0), cases(6, 2, 4, 1, 0.5)
    b[2] = b[2][:1]  # a case with fewer slices
    assert whole(kernel(a, b), a, b) == pytest.approx(kernel_by_pairs(a, b), rel=1e-9)


def test_the_kernel_distance_is_0_on_average_for_few_cases_of_one_distribution_frechet_is_not():
    random = np.random.default_rng(0)
    kernels, frechets = [], []
    for _ in range(400):
        a, b = ([*random.standard_normal((4, 1, 6))] for _ in range(2))
        kernels.append(whole(kernel(a, b), a, b))
        frechets.append(whole(frechet(a, b), a, b))
    error = np.std(kernels) / np.sqrt(len(kernels))
    assert abs(np.mean(kernels)) < 3 * error
    assert np.mean(frechets) > 2


def test_wasserstein_of_histograms_is_scipys():
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 50, (3, 2, 20)).astype(float) for _ in range(2))
    a[1, 0] = 0  # a case without that organ
    found = whole(wasserstein(a, b, 4.0), a, b)
    for organ in range(2):
        mixed = []
        for side in (a, b):
            present = [h[organ] / h[organ].sum() for h in side if h[organ].any()]
            mixed.append(np.mean(present, axis=0))
        bins = 4.0 * np.arange(20)
        expected = stats.wasserstein_distance(bins, bins, *mixed)
        assert found[organ] == pytest.approx(expected)
    b[:, 1] = 0
    assert np.isnan(whole(wasserstein(a, b, 4.0), a, b)[1])
    assert whole(with_mean(wasserstein(a, b, 4.0)), a, b)[0] == pytest.approx(found[0])


def test_auc_is_that_of_mann_and_whitney():
    random = np.random.default_rng(0)
    truth = np.array([[1, 0, 1, 1, 0, 0, 1, np.nan], [1] * 8], float).T
    scores = random.integers(0, 4, (8, 2)) / 4  # with ties
    found = auc(scores, truth)(np.ones(1), np.ones(8))
    has, lacks = (scores[truth[:, 0] == n, 0] for n in (1, 0))
    u = stats.mannwhitneyu(has, lacks).statistic
    assert found[0] == pytest.approx(u / (len(has) * len(lacks)))
    assert np.isnan(found[1])


def test_intervals_of_a_mean_hold_it_in_95_of_100_experiments():
    random = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        sides = [random.normal(0, 1, (40, 1)), random.normal(1, 1, (40, 1))]
        (one,) = estimates(mean_difference(*sides), (40, 40), 100)
        held += one.low <= 1 <= one.high
    assert 0.88 < held / 200 < 0.99


def test_a_centred_interval_does_not_move_with_the_excess_of_the_draws():
    draws = np.random.default_rng(0).normal(0, 1, 1000)
    low, high = centred(5.0, draws + 80)
    assert (low, high) == pytest.approx((3.04, 6.96), abs=0.2)
    assert centred(0.5, draws, (0, 1)) == (0, 1)
    assert centred(5.0, np.full(100, np.nan)) == (None, None)


def test_what_real_cases_score_is_the_mean_over_halves():
    real = cases(8, 2, 3, 0)
    (found,) = floors(frechet(real, real), 8)
    other = cases(8, 2, 3, 0, shift=5.0)
    assert 0 < found < whole(frechet(real, other), real, other)
    assert floors(frechet(real, real), 3) is None


def test_copies_are_found_and_a_narrow_set_is_less_diverse():
    random = np.random.default_rng(0)
    real = [*random.normal(0, 100, (10, 4, 4, 4))]
    fresh = [*random.normal(0, 100, (10, 4, 4, 4))]
    copies = [one + random.normal(0, 5, one.shape) for one in real[:9]] + fresh[:1]
    narrow = [fresh[0] + random.normal(0, 10, fresh[0].shape) for _ in range(10)]
    for made, copied, wide in ((fresh, False, 1), (copies, True, 1), (narrow, False, 0.1)):
        distances = near(real, made)
        weights = np.ones(10), np.ones(10)
        ratio, close = nearness(distances)(*weights)
        assert (close >= 0.9) == copied
        assert (ratio < 0.2) == copied
        assert diversity(distances)(*weights) == pytest.approx(wide, rel=0.15)
    same = near(real, fresh[:1] * 10)
    assert diversity(same)(*weights) == 0
    pairs = closest(near(real, copies))
    assert len(pairs) == 4
    assert all(g == r for g, r in pairs)


def test_distances_of_pairs_are_root_mean_squares():
    a, b = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    b[0, 0, 0] = 8
    distances = near([a, b], [b, b])
    np.testing.assert_allclose(distances.across, [[np.sqrt(8), 0], [np.sqrt(8), 0]])
    np.testing.assert_allclose(distances.to_another, [np.sqrt(8)] * 2)
    assert repeated([("a", "1"), ("b", "2"), ("c", "1")]) == [["a", "c"]]
