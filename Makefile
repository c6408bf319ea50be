# make demo, make test, make test-all, make reproduce, make docs: set up .venv with Python 3.11 or newer, then run.
# PYTHON=path/to/python: use an interpreter that is set up already; nothing is installed.

.PHONY: help demo reproduce reproduce-quick test test-all thorough docs check gpu gpu-compile clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# An interpreter with a plain install must not find the checkout's folders first.
export PYTHONSAFEPATH := 1

ifdef PYTHON
  python := $(PYTHON)
  demo-ready :=
  reproduce-ready :=
  quick-ready :=
  test-ready :=
  all-ready :=
  docs-ready :=
  thorough-ready :=
else
  python := .venv/bin/python
  demo-ready := .venv/demo-ready
  reproduce-ready := .venv/reproduce-ready
  quick-ready := .venv/quick-ready
  test-ready := .venv/test-ready
  all-ready := .venv/all-ready
  docs-ready := .venv/docs-ready
  thorough-ready := .venv/fuzz-ready
endif

help:
	@echo "make demo    train on handwritten digits, measure inference: two minutes"
	@echo "make reproduce-quick   the paper's claims on small data, in three minutes"
	@echo "make reproduce         the same with all data, networks and sweeps, in an hour"
	@echo "make test    run the fast tests: every law with 50 problems, in about two minutes"
	@echo "make test-all   install PyTorch, JAX and ONNX for the CPU; run all tests, with 100 problems"
	@echo "make thorough   run all mutants and fuzz laws and files, for about three hours"
	@echo "make docs    build the documentation site, and say how to serve it"
	@echo "make check   run what CI runs"
	@echo "make gpu     check and measure the GPU kernels on a CUDA device"
	@echo "make gpu-compile   compile the GPU kernels for all architectures, without a GPU"
	@echo "make clean   remove .venv and build outputs"

# The demo ends with make, also where make is killed.
demo: export SRIGL_ENDS_WITH_PARENT := 1
demo: $(demo-ready)
	$(python) examples/demo

# What is interrupted goes on from there when it is given again.
reproduce reproduce-quick: export SRIGL_ENDS_WITH_PARENT := 1
reproduce: $(reproduce-ready)
	$(python) -m srigl_core.benchmarks.reproduce

reproduce-quick: $(quick-ready)
	$(python) -m srigl_core.benchmarks.reproduce --quick

test: $(test-ready)
	SRIGL_TEST_BACKENDS=reference,numba,scipy $(python) -m pytest --import-mode=importlib -n 2 --hypothesis-profile=quick

# Two runs: pytest takes tests, which leaves its subfolders out, for those subfolders too.
test-all: $(all-ready)
	SRIGL_TEST_BACKENDS=reference,numba,scipy $(python) -m pytest --import-mode=importlib -n 2 --hypothesis-profile=ci
	$(python) -m pytest --import-mode=importlib -n 2 --hypothesis-profile=ci tests/slow tests/gpu tests/frameworks

thorough: $(thorough-ready)
	$(python) -m pytest --import-mode=importlib -n 2 --hypothesis-profile=thorough tests/slow/test_laws_on_the_pool.py
	PYTHONPATH=tests:tests/gpu $(python) tests/mutants/table.py
	$(python) tests/fuzz/condensed_file.py --minutes 10
	$(python) tests/fuzz/backends.py --processes 2 --minutes 100 --json build/fuzz/backends.json

docs: $(docs-ready)
	$(python) -m mkdocs build --strict
	@echo "Built. Search needs a server: $(python) -m http.server --directory build/site, and open http://localhost:8000"

check:
	.ci/run

gpu: $(test-ready)
	$(python) tests/gpu/on_device.py

gpu-compile: $(test-ready)
	$(python) tests/gpu/compile_gate.py --arch 75 80 90 100 120 --json benchmarks/results/gpu_kernels.json

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@for candidate in python3.14 python3.13 python3.12 python3.11 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$candidate" -m venv .venv; \
	  fi; \
	done; \
	echo "No Python 3.11 or newer was found; install one, or name one: make demo PYTHON=..." >&2; \
	exit 1

# PyTorch first and by itself, so that nothing else chooses its build. The one for the CPU is much
# smaller; PyTorch's page says which index has it, and PIP_EXTRA_INDEX_URL names an index.
.venv/all-ready: .venv/test-ready
	.venv/bin/python -m pip install --quiet torch==2.13.0
	.venv/bin/python -m pip install --quiet --editable ".[frameworks]"
	@touch $@

.venv/reproduce-ready: .venv/quick-ready
	.venv/bin/python -m pip install --quiet torch==2.13.0
	@touch $@

.venv/demo-ready: extras := demo
.venv/quick-ready: extras := reproduce
.venv/test-ready: extras := demo,test
.venv/docs-ready: extras := docs
.venv/fuzz-ready: extras := fuzz
.venv/demo-ready .venv/quick-ready .venv/test-ready .venv/docs-ready .venv/fuzz-ready: pyproject.toml setup.py | .venv/bin/python
	.venv/bin/python -m pip install --quiet --editable ".[$(extras)]"
	@touch $@
