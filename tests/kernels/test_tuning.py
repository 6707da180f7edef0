"""Which blocks a chip can launch, and the measurement of the fastest ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="launches are of torch's tensors")
pytest.importorskip("triton", reason="kernels need triton: pip install 'fvae-deploy[kernels]'")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from fvae_deploy.errors import EngineError  # noqa: E402
from fvae_deploy.kernels import attention, causal_conv3d, gated_linear  # noqa: E402
from fvae_deploy.kernels.aot import compile_for  # noqa: E402
from fvae_deploy.kernels.blocks import Blocks, Needs, fitting, product  # noqa: E402
from fvae_deploy.kernels.chips import CHIPS, known, like, rated  # noqa: E402
from fvae_deploy.kernels.norm_silu import NONE  # noqa: E402
from fvae_deploy.kernels.record import Recorder, choices, record  # noqa: E402
from fvae_deploy.kernels.tuning import Tuner  # noqa: E402

OFFERED = [Blocks(128, 64, 64, 8, 2), Blocks(64, 64, 64, 4, 3), Blocks(256, 64, 32, 8, 2)]


class Stopwatch:
    """Returns prepared times for launches, in order, and counts the launches."""

    def __init__(self, *seconds: float) -> None:
        self.left, self.count = list(seconds), 0

    def __call__(self, launch):
        launch()
        self.count += 1
        return self.left.pop(0)


def _tuner(folder, *seconds: float, gpu: str = "NVIDIA L4", compiler: str = "triton 3") -> Tuner:
    return Tuner(folder, gpu, compiler, Stopwatch(*seconds))


def _launched(tuner: Tuner, key: str = "convolution", offered=OFFERED) -> Blocks:
    seen: list[Blocks] = []
    tuner(key, offered, seen.append)
    return seen[-1]


def test_the_fastest_blocks_are_launched_and_remembered(tmp_path):
    tuner = _tuner(tmp_path / "tuning", 3.0, 1.0, 2.0)
    assert _launched(tuner) == OFFERED[1]
    assert _launched(tuner) == OFFERED[1], "measured again"
    assert _launched(_tuner(tmp_path / "tuning")) == OFFERED[1], (
        "measured again by the next process"
    )
    assert [p.name for p in (tmp_path / "tuning").iterdir()] == ["nvidia-l4.json"]


def test_launches_with_different_keys_are_measured_separately(tmp_path):
    tuner = _tuner(tmp_path, 3.0, 1.0, 2.0, 1.0, 2.0, 3.0)
    assert _launched(tuner, "wide") == OFFERED[1]
    assert _launched(tuner, "narrow") == OFFERED[0]


def test_one_choice_is_not_measured(tmp_path):
    assert _launched(_tuner(tmp_path), offered=OFFERED[:1]) == OFFERED[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", [{"gpu": "NVIDIA A10"}, {"compiler": "triton 4"}], ids=["GPU", "compiler"]
)
def test_another_gpu_or_compiler_measures_for_itself(tmp_path, other):
    _launched(_tuner(tmp_path, 3.0, 1.0, 2.0))
    assert _launched(_tuner(tmp_path, 1.0, 2.0, 3.0, **other)) == OFFERED[0]


def test_blocks_that_are_no_longer_offered_are_not_launched(tmp_path):
    _launched(_tuner(tmp_path, 3.0, 1.0, 2.0))
    rest = [OFFERED[0], OFFERED[2]]
    assert _launched(_tuner(tmp_path, 2.0, 1.0), offered=rest) == OFFERED[2]


def test_a_stored_choice_is_not_launched_where_another_is_the_only_one_offered(tmp_path):
    _launched(_tuner(tmp_path, 3.0, 1.0, 2.0))
    assert _launched(_tuner(tmp_path), offered=OFFERED[:1]) == OFFERED[0]


def test_what_is_launched_are_the_offered_blocks_not_the_numbers_of_the_file(tmp_path):
    _launched(_tuner(tmp_path, 3.0, 1.0, 2.0))
    stored = json.loads((tmp_path / "nvidia-l4.json").read_text())
    stored["blocks"]["convolution"] |= {"rows": 64.0, "whole": 1}  # equal, but no integer
    (tmp_path / "nvidia-l4.json").write_text(json.dumps(stored))
    assert _launched(_tuner(tmp_path)) is OFFERED[1]


def test_halves_apart_are_offered_only_where_they_cover_a_head_exactly():
    for width in filter(attention.fits, range(16, 513)):
        for target, chip in CHIPS.items():
            for size in (2, 4):
                apart = any(not b.whole for b in attention.offered(width, size, chip))
                assert not apart or width == 512, f"{width} on {target}"
    assert any(not b.whole for b in attention.offered(512, 2, CHIPS["sm_100"]))


@pytest.mark.parametrize("width", [32, 192, 256, 384])
def test_halves_apart_are_refused_where_they_leave_a_head(width):
    q, k, v = torch.zeros(3, 1, 64, 2, width, dtype=torch.float16, device="meta")

    def recorded(key, offered, launch):
        launch(replace(offered[0], whole=False))

    with pytest.raises(ValueError, match=f"expected blocks that cover a head of {width}, found"):
        attention.launch(q, k, v, choose=recorded, run=Recorder(attention.kernel))


@pytest.mark.parametrize("kept", ["", "[]", "{", '{"about": 1}'])
def test_a_damaged_file_is_measured_anew(tmp_path, kept):
    (tmp_path / "nvidia-l4.json").write_text(kept)
    assert _launched(_tuner(tmp_path, 3.0, 1.0, 2.0)) == OFFERED[1]
    assert json.loads((tmp_path / "nvidia-l4.json").read_text())["about"]["gpu"] == "NVIDIA L4"


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "tuning").write_text("in the way")
    tuner = _tuner(tmp_path / "tuning", 3.0, 1.0, 2.0)
    with pytest.warns(UserWarning, match="cannot be stored in .* will be measured again"):
        assert _launched(tuner) == OFFERED[1]
    assert _launched(tuner) == OFFERED[1]


@pytest.mark.parametrize(
    ("target", "chip"),
    [("sm_86", "sm_86"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120")],
)
def test_a_chip_that_is_not_listed_has_the_tightest_limits_of_its_generation(target, chip):
    assert like(target).target == chip
    assert known(target)


@pytest.mark.parametrize("target", ["sm_75", "gfx1100"])
def test_a_generation_that_is_not_known_is_refused(target):
    with pytest.raises(EngineError, match=f"found {target}: use the reference"):
        like(target)
    assert not known(target)


def test_blocks_that_do_not_fit_are_left_out():
    greedy = Blocks(256, 256, 128, 4, 4)
    chip = CHIPS["sm_86"]
    assert fitting([greedy, OFFERED[0]], lambda b: product(b, 2), chip) == [OFFERED[0]]
    assert not Needs(shared=chip.shared + 1, registers=1).fit(chip)
    assert not Needs(shared=1, registers=chip.registers + 1).fit(chip)
    assert not Needs(1, 1, tensor=513).fit(CHIPS["sm_100"])
    assert Needs(1, 1, tensor=513).fit(chip), "the chip has no tensor memory"


@settings(max_examples=200, deadline=None)
@given(
    channels=st.integers(1, 1100),
    width=st.sampled_from([16, 32, 48, 64, 96, 128, 192, 256, 384, 512]),
    size=st.sampled_from([2, 4]),
    target=st.sampled_from(sorted(CHIPS)),
)
def test_every_shape_is_offered_a_few_different_blocks_on_every_chip(channels, width, size, target):
    chip = CHIPS[target]
    for offered in (
        causal_conv3d.offered(channels, size, chip, apart=False),
        causal_conv3d.offered(channels, size, chip, apart=True),
        attention.offered(width, size, chip),
        gated_linear.offered(size, chip),
    ):
        assert 1 <= len(offered) <= 5
        assert len(set(offered)) == len(offered)


def test_launches_share_a_key_by_type_channels_window_and_amount_of_work():
    def key(height: int, channels: int, dtype=torch.float16) -> str:
        seen: list[str] = []
        x = torch.empty(1, height, 64, channels, dtype=dtype, device="meta")
        weight = torch.empty(3, 3, 3, channels, 96, dtype=dtype, device="meta")
        causal_conv3d.launch(
            x, weight, window=causal_conv3d.SAME, choose=lambda key, *_: seen.append(key)
        )
        return seen[0]

    assert key(64, 96) == key(63, 96)
    others = [key(128, 96), key(64, 192), key(64, 96, torch.float32)]
    assert len({key(64, 96), *others}) == 4


def test_the_requested_blocks_are_compiled():
    spec, kernel = next(causal_conv3d.specs())
    offered = causal_conv3d.offered(96, 2, CHIPS["sm_89"], apart=True)
    assert choices(spec, kernel, "sm_89") == offered
    launched = [record(spec, kernel, "sm_89", n)[-1] for n in range(len(offered))]
    assert [r.arguments["BM"] for r in launched] == [blocks.rows for blocks in offered]
    assert [r.arguments["KIND"] != NONE for r in launched] == [blocks.fused for blocks in offered]
    assert compile_for("c", spec, kernel, CHIPS["sm_89"], 1).choice == 1


@pytest.mark.parametrize(
    ("target", "name", "card", "half", "bandwidth"),
    [
        ("sm_90", "NVIDIA H100 80GB HBM3", "H100", 989, 3350),
        ("sm_90", "NVIDIA H100 PCIe", "H100 PCIe", 756, 2000),
        ("sm_90", "NVIDIA H200", "H200", 989, 4800),
        ("sm_80", "NVIDIA A100-SXM4-80GB", "A100", 312, 2039),
        ("sm_80", "NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB", 312, 1555),
        ("sm_89", "NVIDIA L40S", "L40S", 362, 864),
        ("sm_89", "NVIDIA L4", "L4", 121, 300),
    ],
)
def test_a_card_has_the_rates_of_its_own_data_sheet(target, name, card, half, bandwidth):
    chip = rated(target, name)
    assert (chip.card, chip.half, chip.bandwidth) == (card, half, bandwidth)
    assert chip.shared == CHIPS[target].shared


def test_a_card_that_is_not_in_the_table_has_no_ceiling():
    assert rated("sm_89", "NVIDIA GeForce RTX 4090") is None
    assert rated("sm_75", "NVIDIA H100 PCIe") is None


def test_the_cards_of_the_chips_have_the_same_rates_in_both_tables():
    for target, chip in CHIPS.items():
        found = rated(target, chip.card.replace(" SXM", ""))
        assert (found.half, found.single, found.bandwidth) == (
            chip.half,
            chip.single,
            chip.bandwidth,
        )
