# Two targets from one lock: `serve` answers requests and has no torch; `train` makes the artifacts.
#
#   docker build --target serve -t clickserve:serve .
#   docker build --target train -t clickserve:train .
#
# Plain Dockerfile: no BuildKit-only features, so that every engine builds it.

FROM python:3.11-slim-bookworm AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PATH=/opt/clickserve/bin:$PATH
RUN groupadd --gid 65532 clickserve \
 && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /app clickserve \
 && mkdir -p /app /artifacts /data \
 && chown clickserve:clickserve /artifacts /data
WORKDIR /app

# The base image's pip fills a virtual environment that has none, so the images carry no installer of ours. Bytecode is
# compiled here, because a read-only container never could. Dependencies come first and from the lock: changing our code
# installs none of them again. Our package comes last and without dependencies, so their list stays in pyproject.toml.
FROM base AS builder
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PYTHON=/opt/clickserve/bin/python
# Where pip looks besides its own index: --build-arg names one with torch's CPU build, where the plain one brings CUDA.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv --without-pip /opt/clickserve
COPY pyproject.toml requirements.lock ./
COPY deploy/docker/dependencies.py ./deploy/docker/

FROM builder AS serve-builder
RUN python deploy/docker/dependencies.py serve > wanted.txt \
 && pip install --requirement wanted.txt --constraint requirements.lock
COPY README.md LICENSE ./
COPY models ./models
COPY service ./service
RUN pip install --no-deps .

FROM builder AS train-builder
RUN pip install torch==2.13.0 numpy --constraint requirements.lock \
 && python deploy/docker/dependencies.py serve train > wanted.txt \
 && pip install --requirement wanted.txt --constraint requirements.lock
COPY README.md LICENSE ./
COPY models ./models
COPY service ./service
COPY training ./training
RUN pip install --no-deps .

# What runs is not root and phones nobody: onnxruntime reports its use to its makers unless this says otherwise.
FROM base AS runtime
ENV ORT_DISABLE_TELEMETRY=1
USER clickserve

FROM runtime AS train
ENV MPLCONFIGDIR=/tmp/matplotlib
COPY --from=train-builder /opt/clickserve /opt/clickserve
ENTRYPOINT ["python", "-m", "training"]

# Last, so that a build without --target makes the service.
FROM runtime AS serve
COPY --from=serve-builder /opt/clickserve /opt/clickserve
ENV CLICKSERVE_ARTIFACTS_DIR=/artifacts
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
# The port inside is always this one: publish it as another where another is wanted.
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
