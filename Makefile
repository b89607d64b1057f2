# Two commands: `make demo` (the main job, end to end) and `make test`. Each makes its own virtual environment from constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-libero test-lerobot test-gpu lint bench clean

# pip comes first: the one that Python 3.10 brings searches versions without end
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing postbc into $(VENV) (a few minutes the first time)"
	$(INSTALL) pip
	$(INSTALL) --editable '.[robosuite,pusht,tensorboard,hub]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[robosuite,pusht,tensorboard,hub,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/postbc run demo --output runs/demo

test: $(VENV)/installed-dev
	$(BIN)/ruff check src tests benchmarks plugins
	$(BIN)/ruff format --check src tests benchmarks plugins
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# LIBERO's tests, which `make test` skips where LIBERO is not installed (360 MB to download)
$(VENV)/installed-libero: $(VENV)/installed-dev
	$(INSTALL) --editable '.[libero]'
	touch $@

test-libero: $(VENV)/installed-libero
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_libero.py tests/test_libero_demonstrations.py

# LeRobot wants Python 3.12 and versions of its own (6 GB); the tests of everything that touches it, in an environment of its own
PYTHON_LEROBOT ?= python3.12
VENV_LEROBOT   ?= .venv-lerobot

$(VENV_LEROBOT)/installed: pyproject.toml constraints-lerobot.txt $(wildcard plugins/*/pyproject.toml)
	test -x $(VENV_LEROBOT)/bin/python || $(PYTHON_LEROBOT) -m venv $(VENV_LEROBOT)
	$(VENV_LEROBOT)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-lerobot.txt \
		--editable '.[lerobot,robosuite,pusht,metaworld]' --editable plugins/lerobot_policy_postbc --editable plugins/lerobot_env_postbc \
		'lerobot[smolvla]' pytest pytest-xdist hypothesis
	touch $@

test-lerobot: $(VENV_LEROBOT)/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV_LEROBOT)/bin/python -m pytest -n 2 --dist worksteal tests/test_lerobot*.py tests/test_metaworld.py

# on a machine with CUDA: the tests that need it, and the GPU benchmarks
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/installed-dev
	$(BIN)/ruff check --fix src tests benchmarks plugins
	$(BIN)/ruff format src tests benchmarks plugins
	$(BIN)/mypy

# d3rlpy pins gymnasium 1.0.0 and is installed beside it without its pins (benchmarks/bench_iql.py)
$(VENV)/installed-bench: $(VENV)/installed-libero
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps d3rlpy==2.8.1 gym==0.26.2 gym-notices structlog colorama \
		click dataclasses-json marshmallow typing-inspect mypy-extensions tqdm cloudpickle scikit-learn joblib threadpoolctl narwhals
	touch $@

bench: $(VENV)/installed-bench
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
