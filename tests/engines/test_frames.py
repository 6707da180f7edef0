"""States kept frame by frame: the same bits as states in one piece, and no copy of a frame."""

from __future__ import annotations

import numpy as np
import pytest
from engine_contract import Stream, sample

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines import open_vino  # noqa: E402
from fvae_deploy.engines.base import open_engine  # noqa: E402
from fvae_deploy.engines.frames import split_states  # noqa: E402
from fvae_deploy.export.bundle import Part, TensorSpec  # noqa: E402
from fvae_deploy.export.manifest import Manifest  # noqa: E402

CHANNELS, SIZE, PAST = 4, (3, 5), 2


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_stream_has_the_bits_of_one_with_whole_states(small_bundle, direction, monkeypatch):
    manifest = Manifest.load(small_bundle)
    data = sample(manifest, direction, 5, 3, 5)
    opened = open_engine(small_bundle, manifest, "openvino")
    cut = Stream(opened, manifest, direction)
    results = cut.push_all(data, (1, 1, 2, 1))
    parts = {key[0]: compiled for key, compiled in opened._compiled.items()}
    count = len(manifest.part(f"{direction}_step").state_inputs)
    assert parts[f"{direction}_first"].depths == dict.fromkeys(range(count), PAST)

    monkeypatch.setattr(open_vino, "split_states", lambda model, part: (model, {}))
    plain = Stream(open_engine(small_bundle, manifest, "openvino"), manifest, direction)
    np.testing.assert_array_equal(results, plain.push_all(data, (1, 1, 2, 1)))
    for name, spec in zip(cut.state, manifest.part(f"{direction}_step").state_inputs, strict=True):
        state = opened.host(cut.state[name])
        assert state.shape == tuple(cut.state[name].shape) == spec.sized(1, 3, 5)
        np.testing.assert_array_equal(state, plain.engine.host(plain.state[name]))


def test_a_state_may_leave_as_an_array_and_come_back(small_bundle):
    manifest = Manifest.load(small_bundle)
    opened = open_engine(small_bundle, manifest, "openvino")
    data = sample(manifest, "encode", 4, 2, 3)
    kept, moved = (Stream(opened, manifest, "encode") for _ in range(2))
    expected = kept.push_all(data, (1, 1, 1, 1))
    for i in range(5):
        moved.push(data[:, :, max(0, 4 * i - 3) : 4 * i + 1].copy(), first=i == 0)
        moved.state = {n: np.array(opened.host(state)) for n, state in moved.state.items()}
    np.testing.assert_array_equal(np.concatenate(moved.results, axis=2), expected)


def test_a_step_writes_no_frame_twice(small_bundle):
    """The frames of the next state are those of the last one and one new one, not copies."""
    manifest = Manifest.load(small_bundle)
    opened = open_engine(small_bundle, manifest, "openvino")
    stream = Stream(opened, manifest, "encode")
    data = sample(manifest, "encode", 3, 2, 3)
    for i in range(3):
        before = {n: [t.data.ctypes.data for t in state] for n, state in stream.state.items()}
        stream.push(data[:, :, max(0, 4 * i - 3) : 4 * i + 1].copy(), first=i == 0)
        for name, addresses in before.items():
            assert [t.data.ctypes.data for t in stream.state[name]][:-1] == addresses[1:]


def step(change=""):
    """Return a step as export writes it, with one change, and its Part."""
    h, w = SIZE
    x = op.parameter([1, CHANNELS, h, w], np.float32)
    past = op.parameter([PAST, h, w, CHANNELS], np.float32)
    turned = op.transpose(past, op.constant([0, 3, 1, 2]))
    new = op.concat([x, x], 0) if change == "two frames" else x
    frames = op.concat([turned, new] if change != "new frame first" else [new, turned], 0)

    def read(start, stop):
        ends = (op.constant(np.array([n])) for n in (start, stop, 1, 0))
        return op.slice(frames, *ends)

    y = op.add(op.multiply(read(0, 1), op.constant(np.float32(2))), read(1, 2))
    if change == "frames read together":
        y = op.add(y, op.reduce_sum(read(0, 2), op.constant([0]), True))
    if change == "state read elsewhere":
        y = op.add(y, op.reduce_sum(past, op.constant([0, 1, 2, 3]), True))
    if change == "all frames read":
        y = op.add(y, op.reduce_max(frames, op.constant([0]), True))
    kept = op.transpose(read(-PAST, 1 << 62), op.constant([0, 2, 3, 1]))
    y.output(0).set_names({"y"})
    kept.output(0).set_names({"next0"})
    x.output(0).set_names({"x"})
    past.output(0).set_names({"past0"})
    tensor = TensorSpec("x", (1, CHANNELS, "h", "w"))
    state = TensorSpec("past0", (PAST, "h", "w", CHANNELS))
    outputs = (TensorSpec("y", tensor.shape), TensorSpec("next0", state.shape))
    part = Part("s_step", "", (tensor, state), outputs, 1, 0, 2, 1)
    return ov.Model([y, kept], [x, past]), part


def run(model, inputs):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [value.copy() for value in compiled(inputs).values()]


def test_a_step_is_cut_into_frames():
    random = np.random.default_rng(0)
    x = random.standard_normal((1, CHANNELS, *SIZE), np.float32)
    past = random.standard_normal((PAST, *SIZE, CHANNELS), np.float32)
    y, kept = run(step()[0], {"x": x, "past0": past})
    model, depths = split_states(*step())
    assert depths == {0: PAST}
    assert "Concat" not in {node.get_type_name() for node in model.get_ops()}
    again, frame = run(model, {"x": x, "past0.0": past[:1], "past0.1": past[1:]})
    np.testing.assert_array_equal(again, y)
    np.testing.assert_array_equal(np.concatenate([past[1:], frame]), kept)


@pytest.mark.parametrize(
    "change",
    [
        "two frames",
        "new frame first",
        "frames read together",
        "state read elsewhere",
        "all frames read",
    ],
)
def test_a_graph_that_needs_its_state_in_one_piece_keeps_it(change):
    model, depths = split_states(*step(change))
    assert depths == {}
    assert [p.output(0).get_any_name() for p in model.get_parameters()] == ["x", "past0"]


def test_a_past_that_is_not_zero_stays_in_the_graph():
    for value, expected in ((0.0, {0: 2}), (1.0, {})):
        x = op.parameter([1, CHANNELS, *SIZE], np.float32)
        x.output(0).set_names({"x"})
        past = op.constant(np.full((1, CHANNELS, *SIZE), value, np.float32))
        kept = op.transpose(op.concat([past, x], 0), op.constant([0, 2, 3, 1]))
        model = ov.Model([op.relu(x), kept], [x])
        shape = (1, CHANNELS, "h", "w")
        outputs = (TensorSpec("y", shape), TensorSpec("next0", (2, "h", "w", CHANNELS)))
        part = Part("s_first", "", (TensorSpec("x", shape),), outputs, 1, 0, 2, 1)
        assert split_states(model, part)[1] == expected
