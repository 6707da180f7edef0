"""Read a part's ONNX graph together with its weights, which the bundle keeps in one file."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph and the weights that it refers to in a file beside it.

    onnx's own reader refuses weights files that are symbolic links or have several hard links,
    as some package installers create.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        reference = {entry.key: entry.value for entry in tensor.external_data}
        with (path.parent / Path(reference["location"]).name).open("rb") as file:
            file.seek(int(reference["offset"]))
            tensor.raw_data = file.read(int(reference["length"]))
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
    return model
