r"""Stream a CT through a VAE on NVIDIA's Triton Inference Server; write latents to a .npy file.

    fvae triton tiny -o models
    docker run --gpus all -v $PWD/models:/models -p 8001:8001 \
        nvcr.io/nvidia/tritonserver:VERSION-py3 tritonserver --model-repository /models
    pip install 'tritonclient[grpc]'
    python examples/triton_client.py ct.nii.gz latents.npy --model tiny --url localhost:8001

Every CT is one sequence. The server keeps the causal state. Only slices and latents are sent, and
for a network of several stages the maps between them. Not yet run against a server.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import bundle_path, pad_frames
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.volume.open import open_volume


def slabs(manifest: Manifest, ct: Path) -> Iterator[tuple[NDArray[np.float32], bool]]:
    """Yield slabs [1, C, T, H, W] in the model's range, and whether each is the last."""
    geometry = manifest.geometry
    reader, tally = open_volume(ct), ClippingTally()
    height, width = (
        -(-n // geometry.spatial) * geometry.spatial for n in reader.geometry.shape[:2]
    )
    left = reader.geometry.shape[2]
    depth = geometry.first_slices
    for frames in reader.slabs(geometry.first_slices, geometry.temporal):
        x = to_model(frames, manifest.intensity, height, width, tally)
        left -= len(frames)
        yield pad_frames(x.repeat(geometry.channels, axis=0), depth)[None], left == 0
        depth = geometry.temporal
    reader.close()


def encode(client: Any, grpc: Any, manifest: Manifest, ct: Path, sequence: int) -> Any:
    """Stream one CT and return its latents [D, t, h, w]."""
    stages = [f"{manifest.name}-{stage}" for stage in manifest.stages("encode")]
    names = [
        (part.inputs[0].name, part.outputs[0].name)
        for part in (manifest.stage_part(s, first=False) for s in manifest.stages("encode"))
    ]
    latents, first = [], True
    for x, last in slabs(manifest, ct):
        for model, (input_name, output_name) in zip(stages, names, strict=True):
            tensor = grpc.InferInput(input_name, list(x.shape), "FP32")
            tensor.set_data_from_numpy(np.ascontiguousarray(x))
            answer = client.infer(
                model,
                [tensor],
                outputs=[grpc.InferRequestedOutput(output_name)],
                sequence_id=sequence,
                sequence_start=first,
                sequence_end=last,
            )
            x = answer.as_numpy(output_name)
        latents.append(x[0])
        first = False
    return np.concatenate(latents, axis=1)


def main() -> None:
    """Parse the options, stream one CT to a server and save its latents."""
    import tritonclient.grpc as grpc

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path, help="NIfTI file, DICOM folder or Zarr store")
    parser.add_argument("output", type=Path, help=".npy file for the latents")
    parser.add_argument(
        "--model", default="tiny", help="built-in name or folder of the bundle that the server runs"
    )
    parser.add_argument("--url", default="localhost:8001", help="address of the server's gRPC port")
    options = parser.parse_args()
    manifest = Manifest.load(bundle_path(options.model))
    with grpc.InferenceServerClient(options.url) as client:
        np.save(options.output, encode(client, grpc, manifest, options.ct, sequence=1))


if __name__ == "__main__":
    main()
