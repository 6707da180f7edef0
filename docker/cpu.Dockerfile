# fvae on CPUs: OpenVINO and ONNX Runtime, and the server.
#
#   docker build -f docker/cpu.Dockerfile -t fvae:cpu .
#   docker run --rm --read-only --tmpfs /tmp -u "$(id -u)" -v "$PWD:/data" fvae:cpu \
#       reconstruct ct.nii.gz -o recon.nii.gz
#
# Linted, not built.
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/fvae && /opt/fvae/bin/pip install --no-cache-dir '.[cpu,serve]'

FROM python:3.12-slim-bookworm
COPY --from=build /opt/fvae /opt/fvae
# A volume that is new takes the owner of what the image has there.
RUN useradd --uid 10001 --create-home fvae && \
    install -d -m 0700 -o fvae -g fvae /var/lib/fvae
# The root is read-only at run time: what must be written goes to /data and /tmp.
ENV PATH=/opt/fvae/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /data
HEALTHCHECK --interval=60s --timeout=20s CMD ["fvae", "doctor"]
ENTRYPOINT ["fvae"]
CMD ["--help"]
