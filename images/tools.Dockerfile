# The image of split, gate and deploy, and of train where it runs on many nodes: the library without PyTorch.
#   docker build -f images/tools.Dockerfile -t softteacher/tools:VERSION .
# BASE: any image with Python 3.11 or later and its venv module.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# dependencies first: a change of the source must not fetch them again
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import re, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
training = {'torch', 'torchvision', 'tensorboard', 'matplotlib', 'onnxscript'}; \
wanted = [d for d in p['dependencies'] if re.match(r'[\w-]+', d)[0] not in training]; \
print(*wanted, *p['optional-dependencies']['pipeline'], sep='\n')" > requirements.txt \
 && python3 -m venv /opt/venv \
 && /opt/venv/bin/pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY LICENSE README.md ./
COPY softteacher softteacher
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps .

# the same base without pip's downloads and the source; it has no compiler
FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="softteacher/tools" \
      org.opencontainers.image.description="Soft Teacher: split, gate and deploy" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 10001 --user-group --create-home softteacher
COPY --from=build /opt/venv /opt/venv
# the step that trains on many nodes imports components.trainjob; the others bring all their source
COPY components /opt/pipeline/components
ENV SOFTTEACHER_GIT_SHA=${REVISION}
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/opt/pipeline PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# a number, so that Kubernetes can see that it isn't root
USER 10001:10001
WORKDIR /home/softteacher
# no entry point: KFP gives the whole command
CMD ["softteacher", "--help"]
