# Every target does its own set-up, in .venv. A second run installs nothing, unless requirements or constraints changed.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
OUT ?= embedded-again
# Always `python -m`: the scripts of an environment break when its folder is moved.
RUN := $(VENV)/bin/python -m
STAMP := $(VENV)/.installed

ifdef MODEL
export STEERING_MODEL := $(MODEL)
else
# The embedded model is too small to gain from a second thread, and on a busy machine loses a lot by it.
run picture: export OMP_NUM_THREADS ?= 1
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test notebooks lab colab embedded evaluate-embedded full-size gpt2-xl picture benchmark-extraction benchmark-sweep benchmark-mechanisms clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z0-9-]+: .*## / { printf "make %-22s %s\n", $$1, $$2 }' Makefile

run: $(STAMP) ## steer by all six mechanisms and compare (another model: MODEL=gpt2-xl)
	$(RUN) repository.agreement

# A worker for each core; the cells of a notebook depend on each other, so a file stays with one worker.
test: $(STAMP) ## run the tests and every notebook
	$(RUN) pytest --nbval --numprocesses logical --maxprocesses 8 --dist loadfile

notebooks: $(STAMP) ## execute the notebooks again and store their outputs
	$(RUN) repository.notebooks

lab: $(STAMP) ## open the notebooks in JupyterLab (another model: MODEL=gpt2-xl; another port: ARGS="--port 9999")
	JUPYTER_CONFIG_PATH="$(CURDIR)/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(RUN) jupyterlab $$([ "$$(id -u)" -ne 0 ] || echo --allow-root) $(ARGS)

colab: $(STAMP) ## write badge and first cell into the notebooks (REPO=owner/name, else the remote `origin`)
	$(RUN) repository.colab $(if $(REPO),'$(REPO)')

embedded: $(STAMP) ## train the embedded model again, into the folder OUT (default: embedded-again)
	$(RUN) embedded_model.train --out '$(OUT)'

evaluate-embedded: $(STAMP) ## measure how well the embedded model can be steered
	$(RUN) embedded_model.evaluate

full-size: $(STAMP) ## check that the six agree at the size of GPT2-XL (random weights, 16 GB of memory)
	$(RUN) pytest -m full_size tests/mechanisms/test_full_size.py

gpt2-xl: $(STAMP) ## check the published figures on the real GPT2-XL (downloads 6 GB)
	$(RUN) repository.published gpt2-xl

picture: $(STAMP) ## draw the picture of the README again
	$(RUN) repository.readme

benchmark-extraction: $(STAMP) $(PEERS)/.installed ## measure what training a vector costs, beside steering-vectors (16 GB of memory)
	$(RUN) benchmarks.extraction --peer $(PEERS)/bin/python

benchmark-sweep: $(STAMP) ## measure what a sweep costs, beside one run for each setting and prompt
	$(RUN) benchmarks.sweep

benchmark-mechanisms: $(STAMP) $(PEERS)/.installed ## measure what the six mechanisms cost and can do (half an hour, 16 GB of memory)
	$(RUN) benchmarks.abilities
	$(RUN) benchmarks.mechanisms --peer $(PEERS)/bin/python

clean: ## remove the environment and the caches, nothing else
	rm -rf $(VENV) $(PEERS) .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so that an installation that failed or was interrupted is done again.
$(STAMP): requirements.txt constraints.txt
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "This needs Python 3.11 or newer, and '$(PYTHON)' is not: name another one, as in make PYTHON=python3.12" >&2; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV); }
	@echo "Installing into $(VENV); this takes some minutes the first time."
	@$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	@touch $(STAMP)

# The peers of the benchmarks need other versions of the same libraries.
$(PEERS)/.installed: benchmarks/peers.txt
	@$(PYTHON) -m venv --clear $(PEERS)
	@echo "Installing the peers into $(PEERS)."
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	@touch $@
