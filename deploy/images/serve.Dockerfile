# The service: a bundle behind the Open Inference Protocol, without torch. From the repository's root:
#
#   docker build -f deploy/images/serve.Dockerfile -t lesionflow-serve .
#   docker run --rm --read-only --tmpfs /tmp -p 8080:8080 -v "$PWD/runs/first/bundle:/bundle:ro" \
#     lesionflow-serve serve /bundle --host 0.0.0.0
#
# Pin the base with --build-arg DIGEST=sha256:... (`docker buildx imagetools inspect python:3.11-slim`).
ARG BASE=python:3.11-slim
ARG DIGEST=

FROM ${BASE}${DIGEST:+@${DIGEST}} AS build
WORKDIR /build
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
# An environment of its own, so that the next stage copies one directory and leaves the build's tools behind.
RUN python -m venv /opt/lesionflow \
 && /opt/lesionflow/bin/pip install --no-cache-dir --constraint requirements.txt ".[serve]"

FROM ${BASE}${DIGEST:+@${DIGEST}}
# LightGBM's threads.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/lesionflow /opt/lesionflow
# /tmp is the only place that is written to: mount something there and the rest can be read-only.
ENV PATH=/opt/lesionflow/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 1000:1000
EXPOSE 8080
# Kubernetes has probes of its own and doesn't look at this.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=2)"]
ENTRYPOINT ["lesionflow"]
CMD ["serve", "/mnt/models/bundle", "--host", "0.0.0.0", "--port", "8080"]
