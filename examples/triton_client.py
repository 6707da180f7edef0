r"""Stream a CT through a VAE on NVIDIA's Triton Inference Server: latents to a .npy file.

    fvae triton tiny -o models
    docker run --gpus all -v $PWD/models:/models -p 8001:8001 \
        nvcr.io/nvidia/tritonserver:VERSION-py3 tritonserver --model-repository /models
    pip install 'tritonclient[grpc]'
    python examples/triton_client.py ct.nii.gz latents.npy --model tiny --url localhost:8001

Every CT is one sequence. The server keeps the causal state; what travels is slices and latents, and
between the stages of a network that has several, the map. Not yet run against a server.
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
    """Yield [1, C, T, H, W] in the model's range, and whether it is the last."""
    of = manifest.geometry
    reader, tally = open_volume(ct), ClippingTally()
    height, width = (-(-n // of.spatial) * of.spatial for n in reader.geometry.shape[:2])
    left = reader.geometry.shape[2]
    depth = of.first_slices
    for frames in reader.slabs(of.first_slices, of.temporal):
        x = to_model(frames, manifest.intensity, height, width, tally)
        left -= len(frames)
        yield pad_frames(x.repeat(of.channels, axis=0), depth)[None], left == 0
        depth = of.temporal
    reader.close()


def encode(client: Any, grpc: Any, manifest: Manifest, ct: Path, sequence: int) -> Any:
    """Stream one CT; returns latents [D, t, h, w]."""
    stages = [f"{manifest.name}-{stage}" for stage in manifest.stages("encode")]
    names = [
        (part.inputs[0].name, part.outputs[0].name)
        for part in (manifest.stage_part(s, first=False) for s in manifest.stages("encode"))
    ]
    latents, first = [], True
    for x, last in slabs(manifest, ct):
        for model, (given, wanted) in zip(stages, names, strict=True):
            tensor = grpc.InferInput(given, list(x.shape), "FP32")
            tensor.set_data_from_numpy(np.ascontiguousarray(x))
            answer = client.infer(
                model,
                [tensor],
                outputs=[grpc.InferRequestedOutput(wanted)],
                sequence_id=sequence,
                sequence_start=first,
                sequence_end=last,
            )
            x = answer.as_numpy(wanted)
        latents.append(x[0])
        first = False
    return np.concatenate(latents, axis=1)


def main() -> None:
    """Stream one CT to a server."""
    import tritonclient.grpc as grpc

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ct", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="tiny", help="the bundle that the server has")
    parser.add_argument("--url", default="localhost:8001")
    options = parser.parse_args()
    manifest = Manifest.load(bundle_path(options.model))
    with grpc.InferenceServerClient(options.url) as client:
        np.save(options.output, encode(client, grpc, manifest, options.ct, sequence=1))


if __name__ == "__main__":
    main()
