# make demo: set up and run the main job. make test: set up and pass the tests. `make help` lists the rest.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do command -v $$p && break; done)
BIN := .venv/bin
KEEP ?=
DATA ?=
PRESET ?=
SET ?=
PERCENT ?=
UNLABELED ?=
VALIDATION_FRACTION ?=
RUNNER ?=
OUT ?= demo-output
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude='*')
# where the source is, without what a URL may hold of a password; nothing if it is a folder
SOURCE ?= $(shell git remote get-url origin 2>/dev/null | sed -nE 's,^((https?|ssh)://)([^/@]*@)?,\1,p; s,^git@,git@,p')
BUILD_ARGS ?=
IMAGES := image-train image-tools image-triton
# what the images are called; a name of its own for each build that goes to a cluster: docs/kubeflow.md
REPOSITORY := softteacher
TAG = $(VERSION)
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' softteacher/__init__.py)

.PHONY: help venv demo test test-browser test-docker lint manifests-check images $(IMAGES) clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 17
	@echo 'demo takes DATA=folder-or-s3-prefix PRESET=name SET="key=value ..." PERCENT=number UNLABELED=folder' \
		'VALIDATION_FRACTION=number OUT=folder KEEP=1 RUNNER=docker'

# Triton's own is looked at each time: where it was left out, what it lacks may have been installed since
venv: .venv/.stamp  ## .venv with everything, .venv-triton with the model server
	@bash images/triton-venv.sh .venv-triton $(BIN)/python

.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "The module venv is missing: apt-get install" \
		"$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[pipeline,demo,dev]'
	@touch $@

demo: venv $(if $(filter docker,$(RUNNER)),images)  ## the main job, end to end, on this machine
	@$(BIN)/softteacher demo --out $(OUT) $(if $(PERCENT),--percent $(PERCENT)) $(if $(DATA),--data "$(DATA)") \
		$(if $(UNLABELED),--unlabeled "$(UNLABELED)") \
		$(if $(VALIDATION_FRACTION),--validation-fraction $(VALIDATION_FRACTION)) \
		$(if $(PRESET),--preset $(PRESET)) $(foreach s,$(SET),--set '$(s)') $(if $(KEEP),--keep) \
		$(if $(RUNNER),--runner $(RUNNER))

test: venv  ## all tests, in three processes: they wait for servers much of the time
	@{ command -v promtool || test -x $(BIN)/promtool; } >/dev/null || bash images/promtool.sh $(BIN) 2>/dev/null || \
		echo "no promtool (Debian's package prometheus): the tests of the alert rules will be skipped"
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-browser: venv  ## the report in Debian's chromium
	@test -x /usr/bin/chromium || test "$$(id -u)" != 0 || { apt-get update -qq && \
		apt-get install -qq -y --no-install-recommends chromium fonts-liberation; }
	@test -x /usr/bin/chromium || { echo "chromium is missing: apt-get install chromium fonts-liberation"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	$(BIN)/python -m pytest tests/browser

test-docker: venv images  ## the images, and the pipeline in them; needs a Docker Engine
	SOFTTEACHER_TEST_DOCKER=1 $(BIN)/python -m pytest tests/docker

lint: venv  ## ruff, mypy and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint images/*.Dockerfile

manifests-check: venv .venv-checks/.stamp  ## schemas, kubernetes-validate, checkov, promtool on all that kustomize builds
	@command -v promtool >/dev/null || test -x $(BIN)/promtool || bash images/promtool.sh $(BIN)
	MANIFESTS_CHECK=1 $(BIN)/python -m pytest tests/manifests

# checkov pins what others pin otherwise
.venv-checks/.stamp:
	$(PYTHON) -m venv .venv-checks
	.venv-checks/bin/python -m pip install --quiet --disable-pip-version-check checkov==3.3.30
	@touch $@

images: $(IMAGES)  ## the container images, by docker; TAG=name, BUILD_ARGS="--build-arg PIP_INDEX_URL=..." is handed on

$(IMAGES): image-%:
	docker build $(BUILD_ARGS) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) \
		--build-arg SOURCE=$(SOURCE) -f images/$*.Dockerfile -t $(REPOSITORY)/$*:$(TAG) .

clean:  ## remove what was made here, the environments too
	rm -rf .venv .venv-checks .venv-triton demo-output build
