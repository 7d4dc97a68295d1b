# The server of nanovllm in a container.
#
#   docker build -t nanovllm .
#   docker run --read-only --tmpfs /tmp -v nanovllm-cache:/cache -p 127.0.0.1:8000:8000 nanovllm
#
# The kernels are compiled for the machine's CPU at the first start (10 to 20 s) and kept in /cache.
# To build them into the image for one kind of CPU, which the building machine must have too:
#
#   docker build --target built-in --build-arg CPU=x86-64-v3 -t nanovllm:x86-64-v3 .

# With EXTRAS=ray the image has Ray Serve too (deploy/kubernetes/ray).
#
# The versions of all packages are those of deploy/constraints.txt. A tag of the base image moves;
# for the same image again, name the base by its digest (docs/how-to/deploy.md):
#
#   docker build --build-arg BASE=python:3.12-slim@sha256:DIGEST -t nanovllm .

ARG BASE=python:3.12-slim

FROM ${BASE} AS build
ARG EXTRAS=
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY deploy/constraints.txt deploy/constraints.txt
COPY nanovllm nanovllm
# Newer versions of pip read the versions of build tools from a variable of their own.
RUN export PIP_CONSTRAINT=/source/deploy/constraints.txt \
    && export PIP_BUILD_CONSTRAINT=$PIP_CONSTRAINT \
    && python -m venv /opt/nanovllm \
    && /opt/nanovllm/bin/pip install --no-cache-dir ".${EXTRAS:+[$EXTRAS]}" \
    && find /opt/nanovllm -name tests -type d -prune -exec rm -rf {} + \
    && /opt/nanovllm/bin/pip uninstall --yes pip

FROM ${BASE} AS runtime
ARG EXTRAS=
# The probes of the KubeRay operator call wget.
RUN if [ "$EXTRAS" = ray ]; then apt-get update && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/*; fi
RUN useradd --uid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin nanovllm \
    && install -d -o nanovllm -g nanovllm /cache /cache/kernels /cache/models
COPY --from=build /opt/nanovllm /opt/nanovllm
ENV PATH=/opt/nanovllm/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NANOVLLM_CACHE_DIR=/cache/kernels \
    HF_HOME=/cache/models
USER 10001:10001
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
# Compiling and loading happen before /health answers 200.
# The check needs few modules: importing urllib would take half a second of CPU time each.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-ISc", "import socket; s = socket.create_connection(('127.0.0.1', 8000), 2); s.sendall(b'GET /health HTTP/1.0\\r\\n\\r\\n'); raise SystemExit(b' 200 ' not in s.recv(32))"]
ENTRYPOINT ["nanovllm"]
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS built-in
ARG CPU=x86-64-v3
ENV NUMBA_CPU_NAME=${CPU} NANOVLLM_CACHE_DIR=/opt/kernels
USER root
RUN install -d -o nanovllm -g nanovllm /opt/kernels
# The server loads kernels of its own user only.
USER 10001:10001
RUN nanovllm generate "Once upon a time" --max-tokens 2 > /dev/null \
    && nanovllm generate "Once upon a time" --max-tokens 2 --quantization int8 > /dev/null

FROM runtime
