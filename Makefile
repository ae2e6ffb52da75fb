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
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Side by side with the other tools, which get environments of their own. About 90 minutes.
bench-peers: .venv/installed
	$(BIN)/python benchmarks/quantize_speed.py
	$(BIN)/python benchmarks/extract_vs_mergekit.py
	$(BIN)/python benchmarks/train_vs_peft.py
	$(BIN)/python benchmarks/export_vs_genai.py --pairs 5
	$(BIN)/python benchmarks/export_vs_optimum.py
	$(BIN)/python benchmarks/adapters_kept.py
	$(BIN)/python benchmarks/open_elsewhere.py
	$(BIN)/python benchmarks/memory.py --builder
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
