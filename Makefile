# Two commands are enough: `make demo` and `make test`. Each makes .venv when it is not there.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test check format types bench-peers clean
.DEFAULT_GOAL := test

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch .venv/installed

demo: .venv/installed
	$(BIN)/qlt demo

test: .venv/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side by side with the other tools, which get environments of their own. About two and a half hours; what has a result of this very code is not measured again.
# MODEL=DIR: a real decoder as one more size. FORCE=1: measure all of it again.
bench-peers: .venv/installed
	$(BIN)/python benchmarks/side_by_side.py --run $(if $(MODEL),--model $(MODEL)) $(if $(filter-out 0,$(FORCE)),--force)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
