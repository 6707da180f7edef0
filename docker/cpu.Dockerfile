# fvae on CPUs, with OpenVINO and ONNX Runtime, and with the server.
#
#   make page        # optional: fetches the image viewer for the server's page
#   docker build -f docker/cpu.Dockerfile -t fvae:cpu .
#   docker run --rm --read-only --tmpfs /tmp -u "$(id -u)" -v "$PWD:/data" fvae:cpu \
#       reconstruct ct.nii.gz -o recon.nii.gz
#
# A registry of your own: --build-arg PYTHON_IMAGE=registry.local/python:3.12-slim-bookworm. It may be
# any image with Python 3.11 or later and its module venv.
#
# Built with buildah on Debian 12 with Python 3.11 (1.06 GB), and run by runc as user 10001 on a read-only
# root: phantom, reconstruct, generate, doctor, and serve with a job. The default image was not at hand.
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/fvae && /opt/fvae/bin/pip install --no-cache-dir '.[cpu,serve]'

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/fvae /opt/fvae
# A new volume takes its owner from the folder in the image.
RUN useradd --uid 10001 --create-home fvae && \
    install -d -m 0700 -o fvae -g fvae /var/lib/fvae
# The root file system is read-only at run time: fvae writes to /data and /tmp only.
ENV PATH=/opt/fvae/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /data
HEALTHCHECK --interval=60s --timeout=20s CMD ["fvae", "doctor"]
ENTRYPOINT ["fvae"]
CMD ["--help"]
