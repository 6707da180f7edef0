"""What is left out of torch's exporter to spare time does not change its graphs."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs an engine for ONNX graphs")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.onnx._internal.exporter import _fx_passes  # noqa: E402

from fvae_deploy.export import exporter  # noqa: E402


class Translatable(nn.Module):
    """Only operations that ONNX has, some under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Any) -> Any:
        """Map [1, 3, h, w] to [1, 2, 2*h, 2*w]."""
        y = F.silu(self.norm(self.conv(x)))
        y = F.interpolate(F.dropout(y, training=False), scale_factor=2.0, mode="nearest")
        first, second = y.to(torch.float32).to(y).chunk(2, dim=1)
        pair = [first.mean(1, keepdim=True), second.to(torch.float64).amax(1, keepdim=True)]
        moved = torch.cat([pair[0], pair[1].to(torch.float32)], 1).movedim(-3, -1)
        return (moved + moved.to(moved.dtype)).movedim(3, 1)


class InPlace(nn.Module):
    """Also writes into parts of a tensor, and uses operations that ONNX lacks."""

    def forward(self, x: Any) -> Any:
        """Map [1, 3, h, w] to the same shape."""
        y = torch.zeros_like(x)
        y[:, :2] = x[:, 1:]
        y.mul_(2).add_(1)
        other = y.to(y.dtype, copy=True).add_(3)  # a copy, so y stays
        same = y.to(y.dtype).movedim(1, 2).sub_(5).movedim(2, 1)  # y itself
        return torch.addcmul(y, x, other).clamp_(min=-1) + same


def graph(network: nn.Module) -> Any:
    symbols = {axis: torch.export.Dim(f"d{axis}", min=1, max=1 << 16) for axis in (2, 3)}
    program = exporter.run_exporter(
        network.eval(),
        (torch.zeros(1, 3, 5, 6),),
        "a network",
        opset=18,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=(symbols,),
    )
    return exporter.plain_proto(program)


@pytest.mark.parametrize("kind", [Translatable, InPlace])
def test_graphs_are_those_of_the_exporter_as_it_is(kind: Any, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    network = kind()
    found = graph(network)
    monkeypatch.setattr(exporter, "_without_needless_work", contextlib.nullcontext)
    expected = graph(network)
    operations = [Counter(n.op_type for n in each.graph.node) for each in (found, expected)]
    assert operations[0] == operations[1]
    weights, others = (
        {i.name for i in each.graph.initializer if not i.name.startswith("val_")}
        for each in (found, expected)
    )
    assert weights == others
    x = torch.randn(1, 3, 7, 4)
    session = onnxruntime.InferenceSession(found.SerializeToString())
    (y,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(y, network(x).numpy(), atol=1e-6)


def test_only_graphs_that_need_it_are_traced_again(monkeypatch: Any) -> None:
    traced = []
    decompose = _fx_passes.decompose_with_registry
    monkeypatch.setattr(
        _fx_passes, "decompose_with_registry", lambda *a: traced.append(1) or decompose(*a)
    )
    graph(Translatable())
    assert not traced
    graph(InPlace())
    assert traced
