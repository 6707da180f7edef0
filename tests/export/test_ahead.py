"""Streams that look ahead are found in windows: late steps give what the whole window gives."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from ahead_layers import AHEAD, DOUBLED, MIRRORED, Doubling  # noqa: E402
from causal_layers import AHEAD as ALL_SLICES  # noqa: E402
from cut_layers import apart, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fvae_deploy.export.cut.causal import AheadStage, Pace, ahead_stage, causal_stage  # noqa: E402
from fvae_deploy.export.cut.timing import NotCausal  # noqa: E402

PACE = Pace(encode=False, channels=2, spatial=1, temporal=2)


def stream(stage: AheadStage, z: Any, past: tuple[Any, ...] = ()) -> Any:
    """Run all steps over the latent frames z; what comes after the last one does not matter."""
    frames, found = z.shape[2], []
    for step in range(frames + stage.lag // 2):
        given_ = z[:, :, step : step + 1] if step < frames else torch.randn_like(z[:, :, :1])
        x, *past = stage(given_, torch.tensor((step, step - frames + 1)), *past)
        found.append(x)
    return torch.cat(found, 2)[:, :, stage.lag : stage.lag + 1 + 2 * (frames - 1)]


def agrees(network: Any, lengths: Any, plane: tuple[int, int] = (2, 3)) -> AheadStage:
    stage = ahead_stage(network, PACE, check=False)
    for frames in lengths:
        z = torch.randn(1, 2, frames, *plane, dtype=torch.float64)
        assert apart(stream(stage, z), network(z)[0]) < 1e-10, frames
    return stage


@given(
    before=st.lists(st.sampled_from(list(AHEAD)), max_size=3),
    doubled=st.sampled_from(list(DOUBLED)),
    after=st.lists(st.sampled_from(list(AHEAD)), max_size=3),
    residual=st.booleans(),
    plane=st.tuples(*[st.integers(1, 3)] * 2),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_a_stream_that_looks_ahead_equals_its_window_of_any_length(
    before: list[str],
    doubled: str,
    after: list[str],
    residual: bool,
    plane: tuple[int, int],
    seed: int,
) -> None:
    before = [*before, "zeros"]  # at least one layer looks ahead
    network = seeded(
        lambda: Doubling(
            [AHEAD[n](4) for n in before],
            DOUBLED[doubled](4),
            [AHEAD[n](4) for n in after],
            residual,
        ),
        seed,
    )
    agrees(network, (1, 2, 3, 4, 6, 11, 20), plane)


@pytest.mark.parametrize("name", AHEAD)
@pytest.mark.parametrize("doubled", DOUBLED)
def test_each_layer_streams(name: str, doubled: str) -> None:
    network = seeded(
        lambda: Doubling([AHEAD["zeros"](4)], DOUBLED[doubled](4), [AHEAD[name](4)], True)
    )
    agrees(network, range(1, 10))


@pytest.mark.parametrize("name", MIRRORED)
def test_mirrored_ends_stream_where_the_network_can_mirror(name: str) -> None:
    network = seeded(
        lambda: Doubling([MIRRORED[name](4)], DOUBLED["repeated"](4), [MIRRORED[name](4)], True)
    )
    agrees(network, range(3, 12))
    with pytest.raises(NotCausal, match="a window of 1 latent frames does not run"):
        ahead_stage(network, PACE)


def test_a_deep_stream_is_as_late_as_its_layers() -> None:
    network = seeded(
        lambda: Doubling(
            [AHEAD["replicated"](4) for _ in range(9)],
            DOUBLED["repeated"](4),
            [AHEAD["ends repeated"](4) for _ in range(5)],
            True,
        )
    )
    stage = agrees(network, (1, 5, 30))
    assert stage.lag == 2 * 9 + 1 + 5


@pytest.mark.parametrize("name", ["group norm", "reversed", "mean of frames", "position in time"])
def test_what_needs_all_frames_is_no_stream(name: str) -> None:
    network = seeded(
        lambda: Doubling([ALL_SLICES[name](4)], DOUBLED["repeated"](4), [AHEAD["zeros"](4)], False)
    )
    for find in (causal_stage, ahead_stage):
        with pytest.raises(NotCausal):
            find(network, PACE)
