"""Maps above 4 GiB: transposed by OpenVINO itself, as the engine has it do that."""

from __future__ import annotations

import numpy as np
import pytest

from fvae_deploy.stream.limits import available_bytes

ov = pytest.importorskip("openvino", reason="needs the cpu extra")

from openvino import opset13 as op  # noqa: E402

from fvae_deploy.engines.large_maps import LARGE, apply_large_transposes  # noqa: E402

ROWS, CELLS = 2304, 488 * 488  # the frames of CV-VAE's decoder: 256 channels of 9 frames
NEEDED = 11 << 30


@pytest.mark.skipif(available_bytes() < NEEDED, reason="needs 11 GiB of memory")
def test_a_map_above_4_gib_is_transposed_rightly():
    shape, order = [1, 2, ROWS, CELLS], [0, 2, 1, 3]
    assert 4 * 2 * ROWS * CELLS > LARGE
    x = op.parameter(shape, np.float32)
    model = ov.Model([op.transpose(x, op.constant(order))], [x])
    apply_large_transposes(model)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    values = np.zeros(shape, np.float32)
    values[..., [0, -1]] = np.arange(1, 4 * ROWS + 1).reshape(1, 2, ROWS, 2)
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(values, shared_memory=True))
    request.infer()
    moved = request.get_output_tensor().data
    np.testing.assert_array_equal(moved[..., [0, -1]], values[..., [0, -1]].transpose(order))
    assert all(np.count_nonzero(row) == 4 for row in moved[0])
