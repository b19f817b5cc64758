# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
COMPILERS := .cache/compilers

# Tests start many processes, each of which would compile the sources again without bytecode files.
export PYTHONDONTWRITEBYTECODE =

.PHONY: demo test test-all quick full lint format compilers clean

demo: $(VENV)/.installed
	$(BIN)/mukv demo

# Every pair of parts: minutes. The linter and the type checker run beside the tests.
test: $(VENV)/.installed-dev compilers
	$(MAKE) --jobs=2 quick lint

# Every triple of parts, with XLA's optimisations: hours.
test-all: $(VENV)/.installed-dev compilers
	$(MAKE) --jobs=2 full lint

quick: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadgroup

full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist loadgroup -m ""

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# XLA's compiler for GPUs (480 MB, of JAX's own version; no GPU or driver is needed), for the tests of
# compiled programs. Where it can't be installed, they are skipped.
compilers: $(VENV)/.installed-dev
	@test -e $(COMPILERS)/.installed || { \
	  version=$$($(BIN)/python -c "from importlib.metadata import version; print(version('jax'))"); \
	  $(BIN)/python -m pip install --quiet --no-deps --retries 1 --target $(COMPILERS) \
	    jax-cuda12-pjrt==$$version jax-cuda12-plugin==$$version \
	  && touch $(COMPILERS)/.installed; \
	} || echo "no compiler for GPUs: the tests of programs that it compiles are skipped"

clean:
	rm -rf $(VENV) $(COMPILERS)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
