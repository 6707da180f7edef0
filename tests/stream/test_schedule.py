"""Steps cover slices and latent frames once, in order; a stream is entered with enough behind."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fvae_deploy.export.manifest import Geometry
from fvae_deploy.stream.schedule import decoding, enter, latent_frames
from fvae_deploy.stream.schedule import steps as planned_steps

SLICES, KS, PROTOCOL = (
    st.integers(1, 400),
    st.integers(1, 9),
    st.sampled_from(["causal", "windows"]),
)


CAUSAL = Geometry(temporal=4, spatial=8, latent_channels=16, channels=1, window=65)


def steps(slices, protocol, k, geometry=CAUSAL):
    return planned_steps(slices, protocol, k, geometry)


@given(SLICES, PROTOCOL, KS)
def test_every_slice_belongs_to_one_step_in_order(slices, protocol, k):
    covered = [z for step in steps(slices, protocol, k) for z in range(*step.slices)]
    assert covered == list(range(slices))


@given(SLICES, PROTOCOL, KS)
def test_latent_frames_follow_one_another_without_a_gap(slices, protocol, k):
    planned = steps(slices, protocol, k)
    made = [t for step in planned for t in range(*step.latents)]
    assert made == list(range(latent_frames(planned)))


@given(SLICES, KS)
def test_a_causal_stream_gives_one_latent_frame_and_one_more_every_four_slices(slices, k):
    planned = steps(slices, "causal", k)
    assert latent_frames(planned) == 1 + -(-(slices - 1) // 4)
    assert [step.first for step in planned] == [True] + [False] * (len(planned) - 1)


@given(SLICES, KS)
def test_every_window_of_65_slices_gives_17_latent_frames(slices, k):
    planned = steps(slices, "windows", k)
    assert latent_frames(planned) == 17 * -(-slices // 65)
    for step in planned:
        window = step.latents[0] // 17
        assert step.first == (step.latents[0] % 17 == 0)
        assert 65 * window <= step.slices[0] <= step.slices[1] <= 65 * (window + 1)


@given(SLICES, PROTOCOL, KS)
def test_a_step_is_never_given_more_than_its_part_takes(slices, protocol, k):
    for step in steps(slices, protocol, k):
        assert (step.depth, step.frames) == ((1, 1) if step.first else (4 * k, k))
        assert 0 <= step.slices[1] - step.slices[0] <= step.depth
        assert 1 <= step.latents[1] - step.latents[0] <= step.frames


@given(SLICES, PROTOCOL, KS)
def test_slices_and_latent_frames_of_a_step_belong_together(slices, protocol, k):
    """The slices of a latent frame are those that decoding it gives back."""
    for step in steps(slices, protocol, k):
        if protocol == "causal" and not step.first:
            assert step.slices[0] == 1 + 4 * (step.latents[0] - 1)
            assert step.slices[1] == min(1 + 4 * (step.latents[1] - 1), slices)


@given(SLICES, PROTOCOL, KS, st.integers(0, 20), st.data())
def test_entering_backs_up_over_the_context_or_to_the_start_of_the_run(
    slices, protocol, k, context, data
):
    planned = steps(slices, protocol, k)
    target = data.draw(st.integers(0, len(planned) - 1))
    entry = enter(planned, target, context)

    def behind(index):
        return planned[target].latents[0] - planned[index].latents[0]

    assert entry <= target
    assert planned[entry].first or behind(entry) >= context
    assert not any(step.first for step in planned[entry + 1 : target + 1])  # the same run
    if entry < target:  # and no further than needed
        assert behind(entry + 1) < context


def test_the_worked_example_of_the_docstring_holds():
    found = [(s.slices, s.latents) for s in steps(14, "causal", 1)]
    assert found == [
        ((0, 1), (0, 1)),
        ((1, 5), (1, 2)),
        ((5, 9), (2, 3)),
        ((9, 13), (3, 4)),
        ((13, 14), (4, 5)),
    ]


@pytest.mark.parametrize(
    ("slices", "protocol", "k"),
    [
        pytest.param(0, "causal", 1, id="no slices"),
        pytest.param(5, "causal", 0, id="no latent frames a step"),
        pytest.param(5, "reverse", 1, id="an unknown protocol"),
    ],
)
def test_a_stream_that_cannot_be_is_refused(slices, protocol, k):
    with pytest.raises(ValueError, match="expected protocol"):
        steps(slices, protocol, k)


@given(SLICES, KS)
def test_a_network_of_pictures_gives_a_latent_frame_for_every_slice(slices, k):
    pictures = dataclasses.replace(CAUSAL, temporal=1)
    planned = steps(slices, "causal", k, pictures)
    assert latent_frames(planned) == slices
    assert all(step.slices == step.latents for step in planned)


@given(SLICES, st.sampled_from([(65, 17), (64, 16), (9, 3)]))
def test_a_network_of_whole_windows_takes_each_as_one_first_step(slices, window):
    length, frames = window
    whole = dataclasses.replace(CAUSAL, window=length, first_slices=length, first_frames=frames)
    planned = steps(slices, "windows", 1, whole)
    assert [z for step in planned for z in range(*step.slices)] == list(range(slices))
    assert [t for step in planned for t in range(*step.latents)] == list(
        range(frames * -(-slices // length))
    )
    assert all((s.first, s.depth, s.frames) == (True, length, frames) for s in planned)
    with pytest.raises(ValueError, match="expected protocol"):
        steps(slices, "causal", 1, whole)


LAGS = st.integers(0, 60)


@given(SLICES, PROTOCOL, LAGS)
def test_a_decoder_that_looks_ahead_returns_every_slice_once_in_order(slices, protocol, lag):
    late = decoding(steps(slices, protocol, 1), 4, lag)
    assert [z for step in late for z in range(*step.decoded)] == list(range(slices))
    assert all(0 <= step.shown.start <= step.shown.stop <= 4 for step in late)


@given(SLICES, PROTOCOL, LAGS)
def test_a_decoder_that_looks_ahead_takes_the_same_latent_frames(slices, protocol, lag):
    planned = steps(slices, protocol, 1)
    late = decoding(planned, 4, lag)
    assert [s.latents for s in late if s.latents[0] < s.latents[1]] == [s.latents for s in planned]
    assert [s.slices for s in late if s.slices[0] < s.slices[1]] == [
        s.slices for s in planned if s.slices[0] < s.slices[1]
    ]
    assert latent_frames(late) == latent_frames(planned)


@given(SLICES, PROTOCOL, st.integers(1, 60))
def test_the_frame_at_a_place_in_a_step_is_late_by_the_lag(slices, protocol, lag):
    start, last = 0, 0
    late = decoding(steps(slices, protocol, 1), 4, lag)
    for i, step in enumerate(late):
        start = step.slices[0] if step.first else start
        last = i if step.latents[0] < step.latents[1] else last
        since, until = step.clock
        assert step.first == (since == 0)
        if step.latents[0] == step.latents[1]:
            assert until == i - last
        else:
            assert until <= 0
        for place, z in zip(range(4)[step.shown], range(*step.decoded), strict=True):
            assert z - start == 4 * since + place - lag


def test_the_worked_example_of_a_decoder_that_looks_ahead_holds():
    found = [(s.latents, s.decoded) for s in decoding(steps(14, "causal", 1), 4, 7)]
    assert found == [
        ((0, 1), (0, 0)),
        ((1, 2), (0, 1)),
        ((2, 3), (1, 5)),
        ((3, 4), (5, 9)),
        ((4, 5), (9, 13)),
        ((5, 5), (13, 14)),
    ]
