# Triton for clusters that can't take NVIDIA's container: the server of the nvidia-pytriton wheel with its python backend,
# which runs the ONNX file by ONNX Runtime or OpenVINO on processors. `make image-triton`, or
#   docker build -f images/triton.Dockerfile -t softteacher/triton:VERSION .
#   docker run -p 8000:8000 -p 8001:8001 -p 8002:8002 softteacher/triton:VERSION --model-repository=s3://... ...
# BASE: any x86-64 image with glibc 2.35 or later and a Python from 3.11 to 3.13 with its venv module and shared library.
# PIP_INDEX_URL, PIP_EXTRA_INDEX_URL: your mirror.
ARG BASE=python:3.11.15-slim-bookworm

FROM ${BASE} AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY constraints.txt images/triton-requirements.txt ./
RUN python3 -m venv /opt/build \
 && /opt/build/bin/pip install --no-cache-dir -c constraints.txt pip \
 && python3 -m venv --without-pip /opt/venv \
 && /opt/build/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-deps -r triton-requirements.txt
# Where NVIDIA's container has them; of the wheel's Python code nothing is needed. The last line fails the build where the
# backend's process would not find its libpython.
RUN site=$(/opt/venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
 && version=$(python3 -c "import sysconfig; print(sysconfig.get_python_version())") \
 && mv "$site/pytriton/tritonserver" /opt/ \
 && mv "$site/nvidia_pytriton.libs" /opt/tritonserver/lib \
 && mv "/opt/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" /opt/tritonserver/backends/python/ \
 && rm -r "$site/pytriton" /opt/tritonserver/python_backend_stubs \
 && python3 -c "import ctypes, sysconfig; ctypes.CDLL(sysconfig.get_config_var('INSTSONAME'))"

FROM ${BASE}
RUN groupadd --gid 10001 softteacher \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin softteacher
# pip, and what can make it anew, of the base: nothing is installed in a container
RUN find "$(python3 -c 'import sys; print(sys.prefix)')" -depth -regextype posix-extended -regex \
    '.*(-packages/(pip|setuptools|wheel|pkg_resources|_distutils_hack|distutils-precedence)([-.][^/]*)?|/python3[^/]*/ensurepip|/python-wheels|bin/(pip[0-9.]*|wheel))' \
    -exec rm -rf {} +
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/tritonserver /opt/tritonserver
# the backend's process takes its packages from the first python3 on PATH
ENV PATH=/opt/venv/bin:/opt/tritonserver/bin:$PATH LD_LIBRARY_PATH=/opt/tritonserver/lib \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=softteacher
# a number, so that Kubernetes can see that it isn't root
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 8001 8002
# its endpoints open when the models of the start are loaded: up to ten minutes
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 CMD ["python3", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=4)"]
# with and without the word tritonserver, as manifests for NVIDIA's container write it
ENTRYPOINT ["/bin/sh", "-c", "case \"$1\" in -*) set -- tritonserver \"$@\" ;; esac; exec \"$@\"", "entrypoint"]
CMD ["tritonserver", "--help"]
# last, since they change with every commit
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="softteacher/triton" \
      org.opencontainers.image.description="Soft Teacher: Triton with ONNX Runtime and OpenVINO on processors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
