#!/usr/bin/env bash
# Make or renew Triton's own Python environment: triton-venv.sh DIR [PYTHON]
# Does nothing when DIR is up to date. Where Triton can't run it says why and exits with 0: other servers may be used.
set -euo pipefail
dir=${1:?usage: triton-venv.sh DIR [PYTHON]}
requirements=$(cd "$(dirname "$0")" && pwd)/triton-requirements.txt
cmp -s "$requirements" "$dir/requirements.txt" && "$dir/bin/python" -c "" 2>/dev/null && exit 0

suitable() {
  command -v "$1" >/dev/null && "$1" - 2>/dev/null <<'PY'
import ctypes, platform, sys, sysconfig

libc, libc_version = platform.libc_ver()
assert platform.machine() == "x86_64" and libc == "glibc" and tuple(map(int, libc_version.split(".")[:2])) >= (2, 35)
assert (3, 11) <= sys.version_info[:2] <= (3, 13)
if sys.version_info[:2] < (3, 13):  # the wheel brings libpython3.13
    library = f"libpython{sysconfig.get_python_version()}.so.1.0"
    try:
        ctypes.CDLL(library)
    except OSError:
        ctypes.CDLL(f"{sysconfig.get_config_var('LIBDIR')}/{library}")
PY
}

for python in "${2:-python3}" python3.13 python3.12 python3.11 ""; do
  if [ "$python" ] && suitable "$python"; then break; fi
done
if [ -z "$python" ]; then
  echo "Triton is left out: it needs Linux x86-64 with glibc 2.35 or later, and a Python from 3.11 to 3.13 with its shared" \
    "library (Debian, Ubuntu: apt-get install libpython3.11, or 3.12). Or set TRITON_URL and AWS_ENDPOINT_URL_S3 to" \
    "servers of your own."
  exit 0
fi
"$python" -m venv --clear "$dir"
"$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$requirements"
cp "$requirements" "$dir/requirements.txt" # last: says that the environment is whole
