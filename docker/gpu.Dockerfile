# fvae on NVIDIA GPUs, with TensorRT for RTX, ONNX Runtime for CUDA, the tools that build TensorRT
# engines, and the server.
#
#   make page        # optional: fetches the image viewer for the server's page
#   docker build -f docker/gpu.Dockerfile -t fvae:gpu .
#   docker run --rm --gpus all --read-only --tmpfs /tmp -u "$(id -u)" -v "$PWD:/data" fvae:gpu \
#       reconstruct ct.nii.gz -o recon.nii.gz --model bundle --engine tensorrt --device cuda -p fp16
#
# A registry of your own: --build-arg PYTHON_IMAGE=registry.local/python:3.12-slim-bookworm.
#
# The host provides the driver (NVIDIA Container Toolkit); pip installs the CUDA libraries. This file
# was checked with hadolint; the image was not built.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY . .
# The gpu extra brings onnxruntime-gpu. Never add onnxruntime: the two overwrite each other.
RUN python -m venv /opt/fvae && /opt/fvae/bin/pip install --no-cache-dir '.[gpu,serve]'

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/fvae /opt/fvae
# A new volume takes its owner from the folder in the image.
RUN useradd --uid 10001 --create-home fvae && \
    install -d -m 0700 -o fvae -g fvae /var/lib/fvae
# The root file system is read-only at run time: fvae writes to /data and /tmp only.
ENV PATH=/opt/fvae/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /data
HEALTHCHECK --interval=60s --timeout=20s CMD ["fvae", "doctor"]
ENTRYPOINT ["fvae"]
CMD ["--help"]
