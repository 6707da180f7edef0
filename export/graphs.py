"""A part's graph with its weights in it, out of the bundle's one file of weights."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto


def read_graph(path: Path) -> onnx.ModelProto:
    """Read a graph, and the weights that it names in a file beside it.

    onnx's own reader takes no file that is a link or has several, as installers by hard links
    make them.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        with (path.parent / Path(said["location"]).name).open("rb") as file:
            file.seek(int(said["offset"]))
            tensor.raw_data = file.read(int(said["length"]))
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
    return model
