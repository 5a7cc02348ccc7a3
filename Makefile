# make demo: set up and run the main job. make test: set up and pass the tests. `make help` lists the rest.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
BIN := .venv/bin
KEEP ?=
DATA ?=
PRESET ?=
SET ?=
PERCENT ?=
OUT ?= demo-output
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*')
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' softteacher/__init__.py)

.PHONY: help venv demo test test-browser lint images clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12
	@echo 'demo takes DATA=folder-or-s3-prefix PRESET=name SET="key=value ..." PERCENT=number OUT=folder KEEP=1'

venv: .venv/.stamp  ## .venv with everything, .venv-triton with the model server

.venv/.stamp: pyproject.toml constraints.txt images/triton-requirements.txt images/triton-venv.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "python3-venv is missing: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pipeline,demo,dev]'
	bash images/triton-venv.sh .venv-triton $(BIN)/python
	@touch $@

demo: venv  ## the main job, end to end, on this machine
	@$(BIN)/softteacher demo --out $(OUT) $(if $(PERCENT),--percent $(PERCENT)) $(if $(DATA),--data "$(DATA)") \
		$(if $(PRESET),--preset $(PRESET)) $(foreach s,$(SET),--set '$(s)') $(if $(KEEP),--keep)

test: venv  ## all tests, in two processes
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test-browser: venv  ## the report in Debian's chromium
	@test -x /usr/bin/chromium || test "$$(id -u)" != 0 || { apt-get update -qq && \
		apt-get install -qq -y --no-install-recommends chromium fonts-liberation; }
	@test -x /usr/bin/chromium || { echo "chromium is missing: apt-get install chromium fonts-liberation"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest tests/browser

lint: venv  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

images:  ## the container images, by docker
	docker build --build-arg REVISION=$(REVISION) -f images/train.Dockerfile -t softteacher/train:$(VERSION) .
	docker build --build-arg REVISION=$(REVISION) -f images/tools.Dockerfile -t softteacher/tools:$(VERSION) .

clean:  ## remove what was made here, the environments too
	rm -rf .venv .venv-triton demo-output build
