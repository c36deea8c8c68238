# make run    set everything up, then the main job: one real app four ways, with the difference in numbers
# make test   set everything up, then lint and every test, here and in a VM with systemd and all of cgroup v2
# make test-vm  all tests of the VM, those too that take minutes where it is emulated; python -m tests.vm runs one file, or a command
# make fuzz   a million inputs and more, from a new seed, to all that reads what others wrote; some 25 s
# make bench  set everything up and fetch the peers to compare with, then the benchmarks: bench/results/*.json, a plot
# make lint   ruff and mypy alone
# make torch  torch's CPU build for the tests that fork it (optional; they skip without it)
# make install  pocketd and its units for this host (PREFIX=/usr/local); make uninstall
# make clean  remove what the others made in this directory
#
# PYTHON=/path/to/python3 chooses the interpreter; TESTS='tests/x.py -k name' what `make test` runs, on this
# host alone. VM=skip leaves the VM out; ACCEL=kvm CPU=host are QEMU's words for it, found by trying otherwise.

export PYTHON ACCEL CPU
TESTS ?= tests
python := .venv/bin/python

.PHONY: run test test-vm fuzz bench lint torch install uninstall clean

run:
	@deploy/prepare run
	@$(python) examples/faces/main_job.py

test:
	@deploy/prepare test
ifneq ($(TESTS),tests)
	@$(MAKE) --no-print-directory ruff mypy
	@$(python) -m pytest $(TESTS)
else ifeq ($(VM),skip)
	@$(MAKE) --no-print-directory ruff mypy
	@$(python) -m pytest -m 'not slow' $(TESTS)
	@echo 'test: VM=skip: NO TEST RAN IN A VM, and what this host skipped ran nowhere' >&2
else
	@deploy/prepare vm || { echo 'test: NO VM can be made here; to go on without: make test VM=skip' >&2; exit 1; }
	@$(MAKE) --no-print-directory ruff mypy
	@rm -f .cache/vm/outcomes-host.json .cache/vm/results/*/outcomes.json
	@status=0; log=.cache/vm/suites.txt; \
	echo 'test: the VM runs meanwhile, on both kernels; what it says comes last'; \
	$(python) -m tests.vm --suite 6.1 newest >$$log 2>&1 & vm=$$!; \
	trap 'kill $$vm 2>/dev/null' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	$(python) -m pytest -p tests.vm.outcomes --outcomes-to .cache/vm/outcomes-host.json -m 'not slow' $(TESTS) || status=1; \
	wait $$vm || status=1; trap - EXIT; cat $$log; \
	$(python) -m tests.vm --skipped || status=1; \
	$(python) -m tests.vm --report || status=1; \
	exit $$status
endif

test-vm:
	@deploy/prepare vm
	@status=0; $(python) -m pytest -m slow tests/vm || status=1; $(python) -m tests.vm || status=1; exit $$status

fuzz:
	@deploy/prepare test
	@$(python) -m tests.fuzz

bench:
	@deploy/prepare bench
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

install uninstall:
	@deploy/install $@

clean:
	rm -rf .venv .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache nsutil/*.so bench/results examples/*/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
