# make run    set everything up, then the main job: one real app four ways, with the difference in numbers
# make test   set everything up, then lint and every test
# make bench  set everything up, then the benchmarks: bench/results/*.json and a plot
# make lint   ruff and mypy alone
# make torch  torch's CPU build for the tests that fork it (optional; they skip without it)
# make clean  remove what the others made in this directory
#
# PYTHON=/path/to/python3 chooses the interpreter; TESTS='tests/x.py -k name' what `make test` runs.

export PYTHON
TESTS ?= tests
python := .venv/bin/python

.PHONY: run test bench lint torch clean

run:
	@deploy/prepare run
	@$(python) examples/faces/main_job.py

test:
	@deploy/prepare test
	@$(MAKE) --no-print-directory ruff mypy
	@$(python) -m pytest $(TESTS)

bench:
	@deploy/prepare run
	@$(python) -m bench

lint:
	@deploy/prepare lint
	@$(MAKE) --no-print-directory ruff mypy

.PHONY: ruff mypy
ruff:
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
mypy:
	@$(python) -m mypy

torch:
	@deploy/prepare torch

clean:
	rm -rf .venv .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache nsutil/*.so bench/results examples/*/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
