# fvae on NVIDIA GPUs: TensorRT for RTX and ONNX Runtime with CUDA, all that builds engines, and the
# server.
#
#   docker build -f docker/gpu.Dockerfile -t fvae:gpu .
#   docker run --rm --gpus all --read-only --tmpfs /tmp -u "$(id -u)" -v "$PWD:/data" fvae:gpu \
#       reconstruct ct.nii.gz -o recon.nii.gz --model bundle --engine tensorrt --device cuda -p fp16
#
# The driver is the host's (NVIDIA Container Toolkit); CUDA's libraries come from pip. Linted, not
# built.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# onnxruntime and onnxruntime-gpu are one module: the GPU's package alone.
RUN python -m venv /opt/fvae && /opt/fvae/bin/pip install --no-cache-dir '.[gpu,serve]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/fvae /opt/fvae
# A volume that is new takes the owner of what the image has there.
RUN useradd --uid 10001 --create-home fvae && \
    install -d -m 0700 -o fvae -g fvae /var/lib/fvae
# The root is read-only at run time: what must be written goes to /data and /tmp.
ENV PATH=/opt/fvae/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /data
HEALTHCHECK --interval=60s --timeout=20s CMD ["fvae", "doctor"]
ENTRYPOINT ["fvae"]
CMD ["--help"]
