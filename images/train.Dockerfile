# The image of train, evaluate and export: the library with PyTorch, whose wheels bring their own CUDA libraries.
#   docker build -f images/train.Dockerfile -t softteacher/train:VERSION .
# BASE: any image with Python 3.11 or later and its venv module, for example a CUDA image of your own.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# dependencies first: a change of the source must not fetch PyTorch again
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *p['optional-dependencies']['pipeline'], sep='\n')" > requirements.txt \
 && python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY LICENSE README.md ./
COPY softteacher softteacher
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps .

# the same base without pip's downloads and the source; it has no compiler
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="softteacher/train" \
      org.opencontainers.image.description="Soft Teacher: training, evaluation and export" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --user-group --create-home softteacher
COPY --from=build /opt/venv /opt/venv
# /tmp is the one place that a read-only root file system leaves writable
ENV SOFTTEACHER_GIT_SHA=${REVISION}
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR=/tmp/matplotlib NUMBA_CACHE_DIR=/tmp/numba
# a number, so that Kubernetes can see that it isn't root
USER 10001:10001
WORKDIR /home/softteacher
# no entry point: KFP gives the whole command
CMD ["softteacher", "--help"]
