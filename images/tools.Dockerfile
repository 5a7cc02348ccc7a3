# The image of split, gate and deploy, and of train where it runs on many nodes: the library without PyTorch.
#   `make image-tools`, or docker build -f images/tools.Dockerfile -t softteacher/tools:VERSION .
# Why without: its steps are short and run on any node, so that pulling the image is most of their time, and PyPI's PyTorch
#   for x86-64 is the CUDA build, several GB. evaluate and export run on the image that trained, with the very PyTorch that
#   made the weights; for processors only, build that one with PyTorch's CPU index (see train.Dockerfile).
# BASE: any image with Python 3.11 or later and its venv module.
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: your mirror.
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS base
RUN groupadd --gid 10001 softteacher \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin softteacher

FROM base AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN python3 -c "import re, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
training = {'torch', 'torchvision', 'tensorboard', 'matplotlib', 'onnxscript'}; \
wanted = [d for d in p['dependencies'] if re.match(r'[\w-]+', d)[0] not in training]; \
print(*wanted, *p['optional-dependencies']['pipeline'], sep='\n')" > requirements.txt

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
# a layer of its own for the library: a change of the source doesn't ship its dependencies again
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=library /opt/softteacher /opt/softteacher
# the steps that train on many nodes and that report import from it; the others bring all their source
COPY components /opt/softteacher/components
# /tmp is the one place that a read-only root file system leaves writable; USER: some clusters choose a uid without a name
ENV PATH=/opt/venv/bin:/opt/softteacher/bin:$PATH PYTHONPATH=/opt/softteacher \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=softteacher NUMBA_CACHE_DIR=/tmp/numba
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
LABEL org.opencontainers.image.title="softteacher/tools" \
      org.opencontainers.image.description="Soft Teacher: split, gate and deploy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
