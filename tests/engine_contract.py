"""Tests for every engine. A test class inherits `EngineContract` and sets `engine_name`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from fvae_deploy.engines.base import Engine, open_engine
from fvae_deploy.errors import BundleError, EngineError
from fvae_deploy.export.manifest import Manifest

Array = NDArray[np.float32]


class Reference(Protocol):
    """The network on whole clips, without streaming."""

    def encode(self, x: Array) -> Array: ...
    def decode(self, z: Array) -> Array: ...


class LeanVAEReference:
    """The small model in eager float32 torch, with the channels and scale of its export."""

    def __init__(self, model: Any, scale: Sequence[float]) -> None:
        self.model = model
        self.scale = np.array(scale, np.float32)[:, None, None, None]

    def encode(self, x: Array) -> Array:
        import torch

        z = self.model.encode(torch.from_numpy(x).repeat(1, 3, 1, 1, 1))
        return z.numpy() * self.scale

    def decode(self, z: Array) -> Array:
        import torch

        return self.model.decode(torch.from_numpy(z / self.scale)).mean(1, keepdim=True).numpy()


class Stream:
    """Runs one direction of one clip through an engine and copies the results."""

    def __init__(self, engine: Engine, manifest: Manifest, direction: str) -> None:
        self.engine, self.manifest, self.direction = engine, manifest, direction
        self.state: dict[str, Any] = {}
        self.results: list[Array] = []

    def push(self, data: Array, first: bool = False) -> None:
        part = self.manifest.part(f"{self.direction}_{'first' if first else 'step'}")
        step = self.manifest.part(f"{self.direction}_step")
        outputs = self.engine.run(part.name, {part.inputs[0].name: data, **self.state})
        assert set(outputs) == {tensor.name for tensor in part.outputs}
        result = outputs[part.outputs[0].name]
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.float32
        names = zip(step.state_inputs, part.state_outputs, strict=True)
        self.state = {new.name: outputs[old.name] for new, old in names}
        self.results.append(result.copy())

    def push_all(self, data: Array, groups: Sequence[int]) -> Array:
        """Run a whole clip or latent: the first frame, then `groups[i]` latent frames per step."""
        for i, piece in enumerate(pieces(data, groups, 4 if self.direction == "encode" else 1)):
            self.push(piece, first=i == 0)
        return np.concatenate(self.results, axis=2)


def pieces(data: Array, groups: Sequence[int], stride: int) -> list[Array]:
    cuts = np.cumsum([1, *(stride * k for k in groups)])
    assert cuts[-1] == data.shape[2], "the groups must cover the data"
    parts = np.split(data, cuts[:-1], axis=2)
    return [np.ascontiguousarray(part) for part in parts]


def sample(manifest: Manifest, direction: str, frames: int, h: int, w: int, seed: int = 0) -> Array:
    """Return random data for 1 + `frames` latent frames of h x w cells."""
    g, random = manifest.geometry, np.random.default_rng(seed)
    shape = (
        (1, g.channels, 1 + g.temporal * frames, g.spatial * h, g.spatial * w)
        if direction == "encode"
        else (1, g.latent_channels, 1 + frames, h, w)
    )
    return random.normal(0, 0.3, shape).astype(np.float32)


def error(result: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest expected value."""
    assert result.shape == expected.shape
    return float(np.abs(result - expected).max() / np.abs(expected).max())


def zero_state(manifest: Manifest, direction: str, h: int, w: int) -> dict[str, Array]:
    part = manifest.part(f"{direction}_step")
    return {s.name: np.zeros(s.sized(1, h, w), np.float32) for s in part.state_inputs}


class EngineContract:
    engine_name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    tolerance: ClassVar[float] = 2e-5  # of the largest value

    @pytest.fixture(scope="class")
    @classmethod
    def bundle(cls, small_bundle: Path) -> Path:
        return small_bundle

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, small_model: Any) -> Reference:
        from random_lean_vae import SMALL_SCALE

        return LeanVAEReference(small_model, SMALL_SCALE)

    @pytest.fixture(scope="class")
    @classmethod
    def manifest(cls, bundle: Path) -> Manifest:
        return Manifest.load(bundle)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, bundle: Path, manifest: Manifest) -> Iterator[Engine]:
        opened = open_engine(bundle, manifest, cls.engine_name, cls.device)
        yield opened
        opened.close()

    @pytest.fixture(params=["encode", "decode"])
    def direction(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def test_it_has_its_name_and_precision(self, engine: Engine) -> None:
        assert (engine.name, engine.precision) == (self.engine_name, "fp32")

    @pytest.mark.parametrize(
        ("size", "groups"),
        [
            pytest.param((1, 1), (1, 1, 1), id="one cell, one frame a step"),
            pytest.param((3, 5), (1, 1, 1), id="odd plane, one frame a step"),
            pytest.param((3, 5), (2, 1), id="odd plane, two frames then one"),
            pytest.param((3, 5), (3,), id="odd plane, three frames at once"),
            pytest.param((4, 6), (1, 2), id="even plane, one frame then two"),
            pytest.param((2, 1), (), id="the first frame alone"),
        ],
    )
    def test_a_stream_in_any_grouping_equals_the_whole_clip(
        self,
        engine: Engine,
        manifest: Manifest,
        reference: Reference,
        direction: str,
        size: tuple[int, int],
        groups: tuple[int, ...],
    ) -> None:
        data = sample(manifest, direction, sum(groups), *size)
        result = Stream(engine, manifest, direction).push_all(data, groups)
        assert error(result, getattr(reference, direction)(data)) < self.tolerance

    def test_planes_of_different_sizes_may_alternate(
        self, engine: Engine, manifest: Manifest, reference: Reference, direction: str
    ) -> None:
        sizes = ((2, 3), (5, 1), (2, 3))
        clips = [sample(manifest, direction, 2, *size, seed=i) for i, size in enumerate(sizes)]
        results = interleaved(engine, manifest, direction, clips)
        for clip, result in zip(clips, results, strict=True):
            assert error(result, getattr(reference, direction)(clip)) < self.tolerance

    def test_interleaved_streams_give_the_bits_of_separate_ones(
        self, engine: Engine, manifest: Manifest, direction: str
    ) -> None:
        clips = [sample(manifest, direction, 3, 3, 2, seed=i) for i in range(2)]
        separate = [Stream(engine, manifest, direction).push_all(c, (1, 1, 1)) for c in clips]
        together = interleaved(engine, manifest, direction, clips)
        for expected, result in zip(separate, together, strict=True):
            np.testing.assert_array_equal(result, expected)

    def test_the_same_input_gives_the_same_bits_in_a_fresh_engine(
        self, engine: Engine, bundle: Path, manifest: Manifest, direction: str
    ) -> None:
        data = sample(manifest, direction, 2, 3, 4)
        expected = Stream(engine, manifest, direction).push_all(data, (2,))
        again = open_engine(bundle, manifest, self.engine_name, self.device)
        for _ in range(2):
            result = Stream(again, manifest, direction).push_all(data, (2,))
            np.testing.assert_array_equal(result, expected)
        again.close()

    def test_a_stream_entered_midway_from_zeros_is_exact_after_its_context(
        self, engine: Engine, manifest: Manifest, reference: Reference, direction: str
    ) -> None:
        context = manifest.part(f"{direction}_step").context
        data = sample(manifest, direction, 2 + context + 1, 2, 2)
        groups = (1,) * (2 + context + 1)
        stream = Stream(engine, manifest, direction)
        stream.state = zero_state(manifest, direction, 2, 2)
        for piece in pieces(data, groups, 4 if direction == "encode" else 1)[3:]:
            stream.push(piece)
        expected = getattr(reference, direction)(data)
        last = stream.results[-1]
        assert error(last, expected[:, :, -last.shape[2] :]) < self.tolerance

    def test_input_data_is_not_changed_and_may_be_read_only(
        self, engine: Engine, manifest: Manifest, direction: str
    ) -> None:
        data = sample(manifest, direction, 1, 2, 2)
        parts = pieces(data, (1,), 4 if direction == "encode" else 1)
        copies = [piece.copy() for piece in parts]
        for piece in parts:
            piece.flags.writeable = False
        stream = Stream(engine, manifest, direction)
        stream.push(parts[0], first=True)
        stream.push(parts[1])
        for piece, copy in zip(parts, copies, strict=True):
            np.testing.assert_array_equal(piece, copy)

    @pytest.mark.parametrize(
        ("part", "change"),
        [
            pytest.param("encode_first", {"x": (1, 2, 1, 16, 24)}, id="two channels"),
            pytest.param("encode_first", {"x": (1, 1, 1, 12, 24)}, id="height no multiple of 8"),
            pytest.param("encode_first", {"x": (1, 1, 16, 24)}, id="four axes"),
            pytest.param("encode_first", {"x": (1, 1, 4, 16, 24)}, id="four frames at the start"),
            pytest.param("encode_step", {"x": (1, 1, 3, 16, 24)}, id="three frames a step"),
            pytest.param("encode_step", {"past0": (1, 1, 1, 1)}, id="a state of one cell"),
            pytest.param("decode_first", {"z": (1, 7, 1, 2, 3)}, id="seven latent channels"),
            pytest.param("decode_step", {"z": (1, 0, 1, 2, 3)}, id="no latent channel"),
            pytest.param("decode_step", {"past0": (2, 3, 2, 8)}, id="a state with swapped axes"),
            pytest.param("decode_step", {"past0": None}, id="a state missing"),
            pytest.param("encode_first", {"x": None}, id="data missing"),
        ],
    )
    def test_inputs_that_do_not_fit_are_refused_in_one_line(
        self,
        engine: Engine,
        manifest: Manifest,
        part: str,
        change: dict[str, tuple[int, ...] | None],
    ) -> None:
        spec = manifest.part(part)
        inputs = {t.name: np.zeros(t.sized(1, 2, 3), np.float32) for t in spec.inputs}
        engine.run(part, {name: value.copy() for name, value in inputs.items()})
        for name, shape in change.items():
            del inputs[name]
            if shape is not None:
                inputs[name] = np.zeros(shape, np.float32)
        with pytest.raises(EngineError) as caught:
            engine.run(part, inputs)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        fitting = {t.name: np.zeros(t.sized(1, 2, 3), np.float32) for t in spec.inputs}
        engine.run(part, fitting)  # the engine still works

    def test_an_unknown_part_is_refused(self, engine: Engine) -> None:
        with pytest.raises(BundleError, match="encode_last"):
            engine.run("encode_last", {})

    @pytest.mark.parametrize("device", ["cuda", "abacus"])
    def test_a_device_that_is_not_here_is_refused_with_the_remedy(
        self, bundle: Path, manifest: Manifest, device: str
    ) -> None:
        if device == self.device or (device == "cuda" and has_cuda(self.engine_name)):
            pytest.skip("this engine runs there")
        with pytest.raises(EngineError, match=r"expected .* found .*: .*(pip install|use|choose)"):
            open_engine(bundle, manifest, self.engine_name, device)

    def test_closing_twice_is_allowed(self, bundle: Path, manifest: Manifest) -> None:
        opened = open_engine(bundle, manifest, self.engine_name, self.device)
        opened.close()
        opened.close()


def interleaved(
    engine: Engine, manifest: Manifest, direction: str, clips: Sequence[Array]
) -> list[Array]:
    """Run all clips through one engine, one step of each in turn."""
    streams = [Stream(engine, manifest, direction) for _ in clips]
    stride = 4 if direction == "encode" else 1
    steps = (clips[0].shape[2] - 1) // stride
    split_clips = [pieces(clip, (1,) * steps, stride) for clip in clips]
    for i in range(1 + steps):
        for stream, parts in zip(streams, split_clips, strict=True):
            stream.push(parts[i], first=i == 0)
    return [np.concatenate(stream.results, axis=2) for stream in streams]


def has_cuda(engine: str) -> bool:
    if engine == "torch":
        import torch

        return torch.cuda.is_available()
    if engine == "onnxruntime":
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return False
