# Training and the pipeline's steps, on the base's own torch and CUDA. From the repository's root:
#
#   docker build -f deploy/images/train.Dockerfile -t lesionflow-train .
#   docker run --rm --read-only --tmpfs /tmp --shm-size 1g --gpus all -v "$PWD/data:/data:ro" -v "$PWD/runs:/runs" \
#     lesionflow-train run baseline --data /data --out /runs/first
#
# Without GPUs, a base with torch for the CPU is far smaller: --build-arg BASE=...
# Pin the base with --build-arg DIGEST=sha256:... (`docker buildx imagetools inspect` prints it).
ARG BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
ARG DIGEST=

FROM ${BASE}${DIGEST:+@${DIGEST}} AS build
WORKDIR /build
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
# An environment that stands on the base's packages. Those that were built together with its torch
# stay as they are; everything else is as pinned.
RUN grep -viE '^(torch|torchvision|numpy|sympy|networkx|fsspec|filelock)==' requirements.txt > constraints.txt \
 && python -m pip list --format=freeze | grep -iE '^(torch|torchvision)==' >> constraints.txt \
 && python -m venv --system-site-packages /opt/lesionflow \
 && /opt/lesionflow/bin/python -m pip install --no-cache-dir --constraint constraints.txt ".[train,serve,cluster]"

FROM ${BASE}${DIGEST:+@${DIGEST}}
# LightGBM's threads.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lesionflow /opt/lesionflow
# /tmp is the only place outside of volumes that is written to: mount something there and the rest can be read-only.
ENV PATH=/opt/lesionflow/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# Where older Kubeflow Pipelines put the artifacts of a step.
RUN install -d -o 1000 -g 1000 /minio /gcs /s3
WORKDIR /tmp
USER 1000:1000
# A batch job: there is nothing to ask about its health but its exit code.
HEALTHCHECK NONE
ENTRYPOINT ["lesionflow"]
CMD ["--help"]
