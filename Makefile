# `make learn` opens the book, `make test` runs every check. Both need Python 3.11+ and make.
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check -c constraints.txt
# torch is installed before all that depends on it. Its default build for Linux may be the one for
# CUDA, ten times the size: make venv TORCH_INDEX=... asks another index first, such as pytorch.org's
# for CPU.
TORCH_INDEX ?=
# a container's only user is often root, whom JupyterLab refuses unless told
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

.PHONY: help venv lint learn tour test check gpu book run-book figures demo slides pdf keys student clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

venv: .venv/.installed  ## make .venv and install everything into it

# a finished installation leaves .installed behind; a broken off one does not, and is taken up again
.venv/.installed: pyproject.toml constraints.txt $(wildcard kernels/minids_kernels/__init__.py)
	@if [ ! -x $(PY) ]; then \
	  found=; for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "minids needs Python 3.11 or newer with its venv module, and found none on PATH." >&2; \
	    echo "Get one from python.org, or on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	  fi; \
	  echo "making .venv with $$found"; $$found -m venv .venv; \
	fi
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable ".[book,test]"
	@touch $@

learn: venv  ## open the book in JupyterLab
	cd book && ../.venv/bin/jupyter trust *.ipynb
	cd book && ../.venv/bin/jupyter lab $(AS_ROOT) 00_start.ipynb

tour: venv  ## train a small DeepSeek-V3 and let it write, in this terminal
	.venv/bin/minids tour

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	$(PY) book/_tools/normalise.py --check

test: lint  ## run every check, the notebooks too
	@$(PY) book/_tools/chromium_program.py --install  # pages are tested where there is Chromium; a line says if not
	$(PY) -m pytest tests book -p no:cacheprovider --nbval --nbval-current-env \
	  --nbval-cell-timeout=180 --nbval-sanitize-with=book/_tools/nbval.cfg

check: lint  ## run the fast checks: no slow tests, no notebooks
	$(PY) -m pytest tests -m "not slow" -n 2 --dist loadfile

# on a GPU host, offline, from a plain checkout: no .venv, whichever python3 has torch and Triton.
# Four files in OUT: gpu-tests.log, gpu-tests.xml, bench.json, bench.md. Both parts are cut off in
# time to end within 9 minutes. Versions there are not those of constraints.txt: warnings pass.
OUT ?= runs/gpu
GPU_PY ?= python3
GPU_TESTS := tests/test_fp8.py tests/test_impl.py $(wildcard tests/test_kernel_*.py)
# most of the tests' time goes into compiling: several processes, where pytest-xdist is there
GPU_JOBS ?= 8

gpu:  ## test and time the kernels on this machine's NVIDIA GPU: OUT=folder for the results
	@$(GPU_PY) -c "import pytest, torch, triton, typer" 2>/dev/null || { \
	  echo "$(GPU_PY) lacks torch, triton, pytest or typer: GPU_PY=... names another Python" >&2; \
	  exit 1; }
	@mkdir -p "$(OUT)"; export PYTHONPATH=.:kernels; status=0; \
	jobs=; if $(GPU_PY) -c "import xdist" 2>/dev/null; then jobs="-n $(GPU_JOBS)"; fi; \
	timeout -s INT -k 20 210 $(GPU_PY) -m pytest -m gpu $(GPU_TESTS) $$jobs -o addopts=-ra -W default \
	  -p no:cacheprovider --junitxml="$(OUT)/gpu-tests.xml" > "$(OUT)/gpu-tests.log" 2>&1 || status=1; \
	tail -n 12 "$(OUT)/gpu-tests.log"; \
	$(GPU_PY) -m minids_kernels.bench --out "$(OUT)" --seconds 280 || status=1; \
	exit $$status

run-book: venv  ## run the chapters again and keep what they print
	$(PY) book/_tools/normalise.py --execute

book: venv  ## build the book's site from what the chapters print, without running them
	@rm -rf book/_build/html
	$(PY) -m sphinx -q -W --keep-going -d book/_build/doctrees book book/_build/html
	@echo "The site is in book/_build/html, and needs no network and no server. Open"
	@echo "  file://$(CURDIR)/book/_build/html/index.html"

figures: venv  ## draw again the figures that are files: README's and the site's first page's
	@for svg in figures/*.svg; do echo "$$svg"; $(PY) "$${svg%.svg}.py" || exit 1; done

# CH is a chapter, by number or name: make slides CH=04
CH ?=
HOST ?= 127.0.0.1
PORT ?= 8866

demo: venv  ## show the widgets to a class; CH=04 one chapter's, HOST=0.0.0.0 for the whole network
	@$(PY) book/_tools/demo.py $(CH) --host $(HOST) --port $(PORT)

slides: venv  ## make slides of a chapter that open offline: CH=04
	@$(PY) book/_tools/slides.py $(CH)

pdf: book  ## print a chapter to a PDF with Chromium: CH=04
	@$(PY) book/_tools/pdf.py $(CH)

keys: venv  ## write the keys to the exercises, for instructors
	@$(PY) book/_tools/keys.py

student: venv  ## make dist/minids-student.tar.gz, a copy without solutions
	@$(PY) book/_tools/student.py

clean:  ## remove .venv and caches; runs/ is yours and stays
	rm -rf .venv *.egg-info build .pytest_cache .ruff_cache .hypothesis book/_build dist
	find . -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
