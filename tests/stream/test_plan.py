"""A plan fits its budget, or says the least budget that would do; and that one does."""

import dataclasses
import re

import pytest
from fake_engine import write_fake_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from fvae_deploy.errors import PlanError, UsageError
from fvae_deploy.export.manifest import Manifest, Memory
from fvae_deploy.parse import parse_bytes, show_bytes
from fvae_deploy.stream.codec import bundle_path
from fvae_deploy.stream.plan import Stage, plan

BOTH = ("encode", "decode")
TINY = Manifest.load(bundle_path("tiny"), verify=False)


def planned(memory, plane=(64, 64), directions=BOTH, manifest=TINY, engine="openvino", k=1):
    return plan(manifest, directions, plane, engine=engine, precision="fp32", memory=memory, k=k)


def least(plane, directions=BOTH, **options):
    with pytest.raises(PlanError, match="raise --memory") as refused:
        planned(1, plane, directions, **options)
    return parse_bytes(re.search(r"at least (\S+ \S+) for", str(refused.value)).group(1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("700MiB", 700 * 2**20),
        ("2GiB", 2**31),
        ("1.5 GB", 1_500_000_000),
        ("512", 512),
        ("512B", 512),
        ("2g", 2**31),
        ("64M", 2**26),
        ("0.5KiB", 512),
        (" 3 kb ", 3000),
    ],
)
def test_amounts_of_memory_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["lots", "", "-1GiB", "GiB", "1,5GB", "1e9", "2 GiB more", "2TB?"])
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(UsageError, match=re.escape(repr(text))):
        parse_bytes(text)


@given(st.integers(0, 2**45))
def test_what_is_shown_is_never_less_than_what_is_meant(count):
    shown = parse_bytes(show_bytes(count))
    assert count <= shown <= count + max(2**20, count // 50)


@given(
    st.integers(1, 100),
    st.integers(1, 100),
    st.integers(0, 2**31),
    st.sampled_from([BOTH, ("encode",), ("decode",)]),
    st.integers(1, 4),
    st.sampled_from(["openvino", "onnxruntime", "torch"]),
)
def test_a_plan_fits_its_budget(height, width, memory, directions, k, engine):
    try:
        made = planned(memory, (height, width), directions, k=k, engine=engine)
    except PlanError:
        return
    assert made.predicted_bytes <= memory == made.budget_bytes
    assert set(made.grids) == set(directions)
    for direction, grid in made.grids.items():
        assert (grid.height, grid.width) == (height, width)
        assert grid.halo == TINY.part(f"{direction}_step").halo
        assert grid.tiles


@given(st.integers(1, 70), st.integers(1, 120), st.integers(1, 8))
def test_the_least_budget_of_a_refusal_is_enough(height, width, k):
    enough = least((height, width), k=k)
    assert planned(enough, (height, width), k=k).predicted_bytes <= enough


@given(st.integers(1, 70), st.integers(1, 70), st.integers(2**27, 2**31))
@settings(max_examples=50)
def test_more_memory_never_means_more_tiles(height, width, memory):
    def tiles(budget):
        grids = planned(budget, (height, width)).grids.values()
        return max(len(grid.tiles) for grid in grids)

    memory = max(memory, least((height, width)))
    assert tiles(memory + 2**26) <= tiles(memory)


def test_plenty_of_memory_means_no_tiles():
    made = planned(2**36)
    assert [len(grid.tiles) for grid in made.grids.values()] == [1, 1]
    assert made.describe() == "encode whole, decode whole, 1 latent frame per step"


def test_room_to_spare_is_used_and_a_tight_budget_is_run_lean(monkeypatch):
    monkeypatch.setattr("fvae_deploy.export.bundle.HEAVY", 0)
    plane = (64, 64)
    ample, tight = planned(2**36, plane), planned(least(plane), plane)
    assert (ample.lean, tight.lean) == (False, True)
    assert tight.predicted_bytes < ample.predicted_bytes


def test_a_network_that_is_not_heavy_keeps_all_it_has_in_any_budget():
    assert not planned(2**36).lean
    assert not planned(least((64, 64))).lean


def test_half_precision_keeps_half_the_state():
    single, half = (
        Stage.of(TINY, "encode", (64, 64), 1, "openvino", p).state_bytes for p in ("fp32", "bf16")
    )
    assert single == 2 * half > 0


def test_little_memory_means_tiles():
    made = planned(least((64, 64)), k=1)
    assert re.fullmatch(r"encode \d+ tiles, decode \d+ tiles, .*", made.describe())


def test_without_a_budget_the_free_memory_is_shared(monkeypatch):
    monkeypatch.setattr("fvae_deploy.stream.plan.available_bytes", lambda: 10 * 2**30)
    assert planned(None).budget_bytes == 6 * 2**30


def test_an_engine_that_was_never_measured_is_taken_for_the_most_expensive():
    cheap = Memory("openvino", "fp32", "encode", 0, 10)
    dear = dataclasses.replace(cheap, engine="torch", per_cell=10_000)
    manifest = dataclasses.replace(TINY, memory=(cheap, dear))
    unknown, known = (
        planned(2**40, directions=("encode",), manifest=manifest, engine=engine).predicted_bytes
        for engine in ("unheard", "torch")
    )
    assert unknown == known


def test_a_bundle_without_measurements_can_be_planned(tmp_path):
    manifest = write_fake_bundle(tmp_path / "fake")
    assert planned(least((64, 64), manifest=manifest), manifest=manifest).grids
