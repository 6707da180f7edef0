"""A cut stage equals the whole one: random networks of every operation, in tiles of every size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
from cut_layers import FINE, MOVING, PLAIN, WHOLE, Network, Window, apart, cut_of, seeded  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from fvae_deploy.export.cut.cutter import Cut  # noqa: E402
from fvae_deploy.export.cut.plain import run_plain  # noqa: E402


def compare(
    network: Any, cut: Cut, front: tuple[int, ...], plane: tuple[int, int], tile: int
) -> None:
    x = torch.randn(1, *front, *(FINE * n for n in plane), dtype=torch.float64)
    (expected,) = network(x)
    found, _ = run_plain(cut, x, tuple(expected.shape), plane, tile)
    assert apart(found, expected) < 1e-10


@given(
    layers=st.lists(st.sampled_from(list(PLAIN)), min_size=1, max_size=5),
    residual=st.lists(st.booleans(), min_size=5, max_size=5),
    down=st.booleans(),
    plane=st.tuples(*[st.integers(2, 6)] * 2),
    tile=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_a_cut_stage_equals_the_whole(
    layers: list[str],
    residual: list[bool],
    down: bool,
    plane: tuple[int, int],
    tile: int,
    seed: int,
) -> None:
    network = seeded(
        lambda: Network([PLAIN[name](4) for name in layers], residual[: len(layers)], down), seed
    )
    cut = cut_of(network, 1)
    assert cut.program.whole == ()
    compare(network, cut, (1,), plane, tile)


@pytest.mark.parametrize("name", PLAIN)
def test_each_layer_is_cut(name: str) -> None:
    network = seeded(lambda: Network([PLAIN[name](4)], [True], False))
    cut = cut_of(network, 1)
    assert cut.program.whole == ()
    for plane, tile in (((3, 4), 1), ((2, 5), 3), ((1, 1), 1)):
        compare(network, cut, (1,), plane, tile)


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_local_keeps_the_plane_and_says_why(name: str) -> None:
    layers = [PLAIN["convolution"], WHOLE[name], PLAIN["convolution"]]
    network = seeded(lambda: Network([layer(4) for layer in layers], [False] * 3, False))
    cut = cut_of(network, 1)
    assert len(cut.program.whole) == 1
    assert len(cut.program.segments) == 3
    compare(network, cut, (1,), (3, 4), 3)


@pytest.mark.parametrize("name", ["convolution", "down and up", "pooled, interpolated", "wide"])
def test_a_halo_that_is_too_narrow_changes_results(name: str) -> None:
    network = seeded(lambda: Network([PLAIN[name](4)], [False], False))
    cut = cut_of(network, 1)
    (segment,) = cut.program.segments
    assert segment.part.halo
    narrow = dataclasses.replace(segment.part, halo=segment.part.halo - 1)
    narrow = dataclasses.replace(segment, part=narrow)
    program = dataclasses.replace(cut.program, segments=(narrow,))
    with pytest.raises(AssertionError):
        compare(network, Cut(program, cut.modules), (1,), (4, 4), 1)


@pytest.mark.parametrize("down", [False, True])
def test_a_long_local_stage_ends_segments_where_it_is_narrow(down: bool) -> None:
    """Residual blocks at two resolutions: 40 cells of halo in one segment, 6 in several."""

    def block() -> Any:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1))

    finer = nn.Sequential(
        nn.Upsample(scale_factor=2), *[block() for _ in range(4)], nn.AvgPool2d(2)
    )
    layers = [*[block() for _ in range(4)], finer, PLAIN["group norm"](4), *[block()] * 8]
    residual = [isinstance(layer, nn.Sequential) and layer is not finer for layer in layers]
    network = seeded(lambda: Network(layers, residual, down))
    cut = cut_of(network, 1)
    halos = [segment.part.halo for segment in cut.program.segments]
    assert len(halos) > 4
    assert max(halos) <= 8  # 6, and what lies between two narrow places
    for plane, tile in (((3, 4), 1), ((2, 5), 3)):
        compare(network, cut, (1,), plane, tile)


@given(
    layers=st.lists(st.sampled_from(list(MOVING)), min_size=1, max_size=4),
    residual=st.lists(st.booleans(), min_size=4, max_size=4),
    plane=st.tuples(*[st.integers(1, 4)] * 2),
    tile=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_a_cut_window_equals_the_whole(
    layers: list[str], residual: list[bool], plane: tuple[int, int], tile: int, seed: int
) -> None:
    network = seeded(
        lambda: Window([MOVING[name](4) for name in layers], residual[: len(layers)]), seed
    )
    cut = cut_of(network, 1, 4)
    assert cut.program.whole == ()
    compare(network, cut, (1, 4), plane, tile)


@pytest.mark.parametrize("name", MOVING)
def test_each_layer_of_a_window_is_cut(name: str) -> None:
    network = seeded(lambda: Window([MOVING[name](4)], [True]))
    cut = cut_of(network, 1, 4)
    assert cut.program.whole == ()
    for plane, tile in (((3, 2), 1), ((2, 4), 3), ((1, 1), 1)):
        compare(network, cut, (1, 4), plane, tile)


class Beside(nn.Module):
    """A trunk of wide residual blocks; a narrow branch leaves it early and joins it late."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.begin, self.end = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, 1, 1))
            for _ in range(blocks)
        )

    def forward(self, x: Any) -> tuple[Any]:
        y = self.begin(x)
        kept = self.branch(y[:, :1])
        for block in self.blocks:
            y = y + block(y)
        return (self.end(y) + kept,)


def test_a_branch_beside_the_trunk_does_not_keep_segments_from_ending() -> None:
    network = seeded(lambda: Beside(20))
    cut = cut_of(network, 1)
    halos = [segment.part.halo for segment in cut.program.segments]
    assert len(halos) > 5
    assert max(halos) <= 14  # 12, and what lies between two narrow places; in one segment: 42
    for plane, tile in (((3, 4), 1), ((2, 5), 3)):
        compare(network, cut, (1,), plane, tile)


class Chunks(nn.Module):
    """Four frames at a time through the same layers, as code does that saves memory."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.window = Window(layers, [True] * len(layers))

    def forward(self, x: Any) -> tuple[Any]:
        return (torch.cat([self.window(chunk)[0] for chunk in x.split(4, dim=2)], 2),)


@given(
    layers=st.lists(st.sampled_from(list(MOVING)), min_size=1, max_size=3),
    chunks=st.integers(2, 3),
    plane=st.tuples(*[st.integers(1, 4)] * 2),
    tile=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=20)
def test_chunks_of_frames_equal_the_whole(
    layers: list[str], chunks: int, plane: tuple[int, int], tile: int, seed: int
) -> None:
    network = seeded(lambda: Chunks([MOVING[name](4) for name in layers]), seed)
    cut = cut_of(network, 1, 4 * chunks)
    compare(network, cut, (1, 4 * chunks), plane, tile)


def most_alive(program: Any, sizes: Mapping[str, int] | None = None) -> int:
    """Return the most maps that wait at a time, or the sum of their sizes."""
    alive, most = {program.data}, 0
    for segment in program.segments:
        alive |= set(segment.outputs)
        most = max(most, len(alive) if sizes is None else sum(sizes.get(n, 0) for n in alive))
        alive -= set(segment.done)
    return most


class Narrowing(nn.Module):
    """Chunks of two frames through wide layers to one channel, as decoders do."""

    def __init__(self) -> None:
        super().__init__()
        wide = [nn.Conv3d(1, 32, 3, padding=1), nn.GroupNorm(2, 32), nn.Conv3d(32, 32, 3, 1, 1)]
        self.layers = nn.Sequential(*wide, nn.GroupNorm(2, 32), nn.Conv3d(32, 1, 3, padding=1))

    def forward(self, x: Any) -> tuple[Any]:
        return (torch.cat([self.layers(chunk) for chunk in x.split(2, dim=2)], 2),)


def test_the_last_map_of_a_chunk_does_not_wait_for_the_other_chunks() -> None:
    network = seeded(Narrowing)
    most = []
    for chunks in (1, 4):
        cut = cut_of(network, 1, 2 * chunks)
        sizes = {spec.name: prod(int(n) for n in spec.sized(1, 1, 1)) for spec in cut.program.maps}
        most.append(most_alive(cut.program, sizes))
        compare(network, cut, (1, 2 * chunks), (3, 4), 2)
    assert most[1] <= 1.5 * most[0]  # kept until the end, it would be more than twice as much


def test_chunks_run_one_after_the_other_and_share_their_parts() -> None:
    def layers() -> list[nn.Module]:
        pairs = ((nn.Conv3d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)) for _ in range(4))
        return [layer for pair in pairs for layer in pair]

    one, five = (cut_of(seeded(lambda: Chunks(layers())), 1, 4 * n) for n in (1, 5))
    assert len(five.program.segments) > 4 * len(one.program.segments) - 5
    assert len(five.program.parts) <= len(one.program.parts) + 5  # what takes or gives all frames
    assert most_alive(five.program) <= most_alive(one.program) + 6  # the ends of all chunks
    network = seeded(lambda: Chunks(layers()))
    compare(network, five, (1, 20), (3, 4), 2)
