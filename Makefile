# `make train` and `make test` set everything up in .venv first; nothing else is needed on the machine than Python and make.
VENV ?= .venv
BASE_PYTHON ?= python3
# A pip index with the torch build you want, e.g. https://download.pytorch.org/whl/cpu; empty: pip's default. It is asked
# beside the default one, which has the pinned versions of everything else; pip prefers 2.13.0+cpu to 2.13.0 by itself.
TORCH_INDEX ?=
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: train test test-slow families lint bench bench-all bench-gpu reproduce table vars sweep demo-base demo-small demo-sft clean

train: $(READY)
	$(PYTHON) train.py fit --config configs/avar_sft.yaml

test: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	$(PYTHON) -m pytest -n 2 --dist worksteal -m slow

# The table of docs/families.md: every family with everything, on small random models (two minutes on a core).
families: $(READY)
	$(PYTHON) -m pytest tests/families -m '' --write-matrix

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# A small case of each benchmark, a quarter of an hour on one core; pages in runs/bench.
QUICK := --output runs/bench
bench: $(READY)
	$(PYTHON) benchmarks/attention_op.py $(QUICK) --lengths 1024 --images 256 --repeats 5
	$(PYTHON) benchmarks/attention_layers.py $(QUICK) --cases thin-2-1024 thin-2-2048 thin-4-1024 --repeats 5
	$(PYTHON) benchmarks/sft_step.py $(QUICK) --cases small-4-512 small-4-2048 --repeats 5
	$(PYTHON) benchmarks/step_profile.py $(QUICK) --cases small-4-512 --repeats 5
	$(PYTHON) benchmarks/vas_validation.py $(QUICK) --cases small-4-512 --repeats 5
	$(PYTHON) benchmarks/steering_overhead.py $(QUICK) --lengths 256 --repeats 5
	$(PYTHON) benchmarks/grpo_step.py $(QUICK) --steps 5
	$(PYTHON) benchmarks/data_pipeline.py $(QUICK) --samples 128 --rounds 5 --epochs 1 --trainings 1
	$(PYTHON) benchmarks/lm_loss.py $(QUICK) --lengths 1024 --repeats 3

# The pages of benchmarks/results again: two to three hours on one core, which nothing else should use meanwhile.
bench-all: $(READY)
	$(PYTHON) benchmarks/attention_op.py
	$(PYTHON) benchmarks/attention_layers.py
	$(PYTHON) benchmarks/sft_step.py
	$(PYTHON) benchmarks/step_profile.py
	$(PYTHON) benchmarks/vas_validation.py
	$(PYTHON) benchmarks/steering_overhead.py
	$(PYTHON) benchmarks/grpo_step.py
	$(PYTHON) benchmarks/data_pipeline.py
	$(PYTHON) benchmarks/lm_loss.py
	$(PYTHON) benchmarks/doctor_estimates.py

# The same questions on a CUDA GPU, in the shapes of 7B models (steering of 3B); 80 GB are enough for all but the longest
# eager ones. GRPO and the data pipeline are measured on a CPU only.
bench-gpu: $(READY)
	$(PYTHON) benchmarks/attention_op.py --device cuda --dtype bfloat16 --lengths 1024 4096 8192 16384 32768 --images 256 1024 4096
	$(PYTHON) benchmarks/attention_layers.py --device cuda --dtype bfloat16
	$(PYTHON) benchmarks/sft_step.py --device cuda --dtype bfloat16 --cases medium-8-4096 7b-4-4096
	$(PYTHON) benchmarks/vas_validation.py --device cuda --dtype bfloat16 --cases medium-8-4096 7b-4-4096
	$(PYTHON) benchmarks/steering_overhead.py --device cuda --dtype bfloat16 --layers 8 --lengths 2048 8192
	$(PYTHON) benchmarks/lm_loss.py --device cuda --dtype bfloat16 --lengths 4096 16384 --hidden 3584
	$(PYTHON) benchmarks/doctor_estimates.py --device cuda --hidden 2048 --layers 16 --vocabulary 152064 --length 4096

# docs/reproduction.md: 120 trainings and what is measured of them; goes on where it stopped (hours on 2 cores).
reproduce: $(READY)
	$(PYTHON) -m benchmarks.reproduction

# The measured table of docs/guidance.md: every guidance form and query set, several seeds (three quarters of an hour on 2 cores).
table: $(READY)
	$(PYTHON) benchmarks/guidance_table.py

# The measured table of docs/grpo.md: GRPO without and with each visual reward, several seeds (an hour on 2 cores).
vars: $(READY)
	$(PYTHON) benchmarks/vars_table.py

# The paper's intervention on the newest model of `make train`: 23 settings on the 200 validation questions.
sweep: $(READY)
	@ls -d runs/avar_sft/version_*/hf >/dev/null 2>&1 || { echo "error: no trained model in runs/avar_sft; run make train first."; exit 1; }
	$(VENV)/bin/avar sweep "$$(ls -td runs/avar_sft/version_*/hf | head -1)" "$$(ls -td data/demo/world-*/val-anchored-200-* | head -1)" runs/sweep \
		--image 0,0.15,0.3 --system 0,0.05,0.4,0.6 --mode logit,mass --max-new-tokens 128 --batch-size 100 --overwrite

# Rebuild the embedded base model: tokenizer and configuration, then two stages of pretraining.
demo-base: $(READY)
	$(PYTHON) -m avar_lightning.data.demo_base avar_lightning/data/demo_base
	$(PYTHON) train.py fit --config configs/demo_pretrain.yaml
	cp -r "$$(ls -td runs/demo_pretrain/version_*/hf | head -1)/." avar_lightning/data/demo_base
	$(PYTHON) train.py fit --config configs/demo_pretrain.yaml --config configs/demo_pretrain_read.yaml
	cp -r "$$(ls -td runs/demo_pretrain_read/version_*/hf | head -1)/." avar_lightning/data/demo_base

# A smaller base, made in the same way.
demo-small: $(READY)
	$(PYTHON) -m avar_lightning.data.demo_base avar_lightning/data/demo_small --size small
	$(PYTHON) train.py fit --config configs/demo_pretrain.yaml --model.init_args.vlm.pretrained demo_small \
		--trainer.logger.init_args.name demo_pretrain_small
	cp -r "$$(ls -td runs/demo_pretrain_small/version_*/hf | head -1)/." avar_lightning/data/demo_small
	$(PYTHON) train.py fit --config configs/demo_pretrain.yaml --config configs/demo_pretrain_read.yaml \
		--model.init_args.vlm.pretrained demo_small --trainer.logger.init_args.name demo_pretrain_read_small
	cp -r "$$(ls -td runs/demo_pretrain_read_small/version_*/hf | head -1)/." avar_lightning/data/demo_small

# Where GRPO begins: the base after a cold start on responses of mixed style, so that there is a choice to make.
demo-sft: $(READY)
	$(PYTHON) train.py fit --config configs/avar_sft.yaml --data.init_args.style mixed --trainer.val_check_interval 300 \
		--trainer.logger.init_args.name demo_sft
	cp -r "$$(ls -td runs/demo_sft/version_*/hf | head -1)/." avar_lightning/data/demo_sft

$(READY): pyproject.toml constraints.txt
	$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python %s is too old, expected 3.11 or newer; set BASE_PYTHON." % sys.version.split()[0])'
	$(PYTHON) -m pip --version >/dev/null 2>&1 || $(BASE_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --constraint constraints.txt torch
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs data build *.egg-info .pytest_cache .mypy_cache .ruff_cache
