# The image of train, evaluate and export: the library with PyTorch. `make image-train`, or
#   docker build -f images/train.Dockerfile -t softteacher/train:VERSION .
# BASE: PyTorch's wheels bring CUDA's libraries, so Python's slim image serves GPUs too. Name a CUDA base, such as
#   nvidia/cuda:13.0.2-base-ubuntu24.04, for its compatibility package where the nodes' driver is older.
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: your mirror; https://download.pytorch.org/whl/cpu as the extra one makes an image
#   without CUDA, for evaluate and export on a processor.
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS base
# a CUDA base has no Python, and its release decides which one fits
# hadolint ignore=DL3008
RUN python3 -c "import ensurepip, venv" 2>/dev/null || { apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*; }
RUN groupadd --gid 10001 softteacher \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin softteacher

FROM base AS requirements
WORKDIR /src
COPY pyproject.toml ./
# OpenVINO too: export measures the engines that may serve
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; extra = p['optional-dependencies']; \
print(*p['dependencies'], *extra['pipeline'], *extra['openvino'], sep='\n')" > requirements.txt

FROM base AS dependencies
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY constraints.txt ./
# by themselves: pyproject.toml changes more often than what it asks for
COPY --from=requirements /src/requirements.txt ./
# pip and setuptools of /opt/build stay behind
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir -c constraints.txt pip setuptools \
 && python3 -m venv --without-pip /opt/venv \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-cache-dir -r requirements.txt -c constraints.txt

FROM dependencies AS library
COPY LICENSE README.md pyproject.toml ./
COPY softteacher softteacher
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels . \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-deps --target /opt/softteacher /opt/wheels/*.whl

FROM base
# pip, and what can make it anew, of the base: nothing is installed in a container
RUN find "$(python3 -c 'import sys; print(sys.prefix)')" -depth -regextype posix-extended -regex \
    '.*(-packages/(pip|setuptools|wheel|pkg_resources|_distutils_hack|distutils-precedence)([-.][^/]*)?|/python3[^/]*/ensurepip|/python-wheels|bin/(pip[0-9.]*|wheel))' \
    -exec rm -rf {} +
# a layer of its own for the library: a change of the source doesn't ship PyTorch again
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=library /opt/softteacher /opt/softteacher
# /tmp is the one place that a read-only root file system leaves writable; USER: some clusters choose a uid without a name
ENV PATH=/opt/venv/bin:/opt/softteacher/bin:$PATH PYTHONPATH=/opt/softteacher \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=softteacher MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
# a number, so that Kubernetes can see that it isn't root
USER 10001:10001
WORKDIR /tmp
# no entry point: KFP gives the whole command
CMD ["softteacher", "--help"]
# last, since they change with every commit
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
ENV SOFTTEACHER_GIT_SHA=${REVISION}
LABEL org.opencontainers.image.title="softteacher/train" \
      org.opencontainers.image.description="Soft Teacher: training, evaluation and export" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
