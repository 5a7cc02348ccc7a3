#!/usr/bin/env bash
# promtool out of Debian's package prometheus, into a folder; nothing is installed or started, and root isn't needed.
#   promtool.sh TARGET_FOLDER
set -euo pipefail
target=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
if ! timeout 120 apt-get -qq download prometheus 2>/dev/null; then
  [ "$(id -u)" = 0 ] && timeout 120 apt-get -qq -o Acquire::Retries=0 update && timeout 120 apt-get -qq download prometheus
fi
dpkg-deb -x prometheus_*.deb .
install usr/bin/promtool "$target/promtool"
