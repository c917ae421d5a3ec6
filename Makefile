# Everything a fresh machine needs: Python >= 3.11, a C++ compiler, make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test bench peers interop moto oldest sanitize lint clean help
help:  ## show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## create .venv, install pinned versions, build the extension

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python >= 3.11 is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

# Reinstalls only when one of these files is newer than the last installation.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt "setuptools>=77" pybind11 wheel
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## run the main job on real text: runs/demo/report.html
	$(BIN)/velopath demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest

bench: $(STAMP)  ## run the benchmarks that need no GPU
	$(BIN)/python -m benchmarks all

peers: .venv-peers/.installed .venv-mosaic/.peer  ## install the data loaders that bench compares with (2.5 GB)

.venv-peers/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -q -r benchmarks/peers.txt
	@touch $@

.venv-mosaic/.peer:
	$(PYTHON) -m venv .venv-mosaic
	.venv-mosaic/bin/python -m pip install --disable-pip-version-check -q mosaicml-streaming==0.13.0 torch==2.13.0
	@touch $@

interop: $(STAMP)  ## check both directions against mosaicml-streaming, in .venv-mosaic (1 GB)
	PYTHONPATH=tests $(BIN)/python -m interop.check --venv .venv-mosaic --results tests/interop/results

moto: $(STAMP)  ## check remote data against moto's S3 server, in .venv-moto (320 MB)
	PYTHONPATH=tests $(BIN)/python -m interop.moto_check --venv .venv-moto --results tests/interop/results

oldest: $(STAMP)  ## run the tests on the oldest torch and Triton allowed, in .venv-oldest (5 GB)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -q torch==2.11.0 triton==3.6.0 'numpy<2.4' \
		numba scipy zstandard xxhash pydantic omegaconf PyYAML typer rich tokenizers safetensors matplotlib plotly \
		hypothesis pytest transformers accelerate pyarrow datasketch py3langid obstore
	CUDA_VISIBLE_DEVICES= PYTHONPATH=engine .venv-oldest/bin/python -m pytest -p no:cacheprovider

sanitize:  ## run the C++ core under ASan, UBSan and TSan; longer: make sanitize MINUTES=30
	$(PYTHON) tests/fuzz/sanitize.py --minutes $(or $(MINUTES),0)

lint: $(STAMP)  ## ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove what was built and run, not .venv
	rm -rf build runs engine/*.egg-info engine/velopath/_core*.so
