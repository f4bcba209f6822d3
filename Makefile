# On a fresh machine, `make demo` and `make test` install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo_out

.PHONY: install demo test quick coverage mutants lint types docs format bench gpu clean

install: $(VENV)/installed

# The stamp is written last, so that an interrupted install starts over.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# The three stages on scikit-learn's 1,797 digits, no download: pretrain, fine-tune with noise, predict the held-out fifth; and the
# same fine-tuning from scratch, to compare with.
ENCODER := --model vit_custom_patch2 --model_kwargs embed_dim=96 depth=6 num_heads=3
demo: install
	$(BIN)/python main_pretrain_noprop.py @recipes/digits_pretrain.args --resume auto --output_dir $(DEMO)/pretrain
	$(BIN)/python main_finetune.py @recipes/digits_finetune.args --resume auto --output_dir $(DEMO)/finetune \
	    --finetune $(DEMO)/pretrain/checkpoint-last.pth
	$(BIN)/python main_finetune.py @recipes/digits_finetune.args --resume auto --output_dir $(DEMO)/from_scratch $(ENCODER)
	@echo "without pretraining:"
	$(BIN)/python main_finetune.py --eval --resume $(DEMO)/from_scratch/checkpoint-best.pth
	@echo "with pretraining:"
	$(BIN)/python main_predict.py --checkpoints $(DEMO)/finetune --views 1 --output_dir $(DEMO)/predict
	@echo "pictures and tables: $(DEMO)/pretrain/report.html $(DEMO)/finetune/report.html $(DEMO)/predict/report.html"
	@ls $(DEMO)/*/*.png $(DEMO)/predict/predictions.csv

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What `make test` runs, without the tests that are marked as slow: about a minute.
quick: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Lines and branches that no test of `make test` runs, in this process or in those that it starts.
coverage: install
	OMP_NUM_THREADS=1 $(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

# SAMPLE faults, drawn with SEED, one at a time: which ones do the quick tests notice? Two at a time; bench/mutants.md.
SAMPLE ?= 200
SEED ?= 1
mutants: install
	SAMPLE=$(SAMPLE) SEED=$(SEED) $(BIN)/python -m bench.mutants

# Small settings, some eight minutes on an idle machine; rewrites bench/BENCH.md.
bench: install
	$(BIN)/python -m bench.run_all

# On a machine with a GPU, at most 8 minutes: what a GPU must do as the CPU does, then the speed there; writes $(OUT)/GPU.md and
# GPU.json. Takes .venv, or a Python that has what it needs already, or installs. DEVICE=cpu runs the same code in miniature.
DEVICE ?= cuda
OUT ?= bench
NEEDED := torch torchvision timm sklearn scipy cv2 matplotlib tensorboard pytest
HAS_ALL := import importlib.util as i, sys; sys.exit(not all(map(i.find_spec, '$(NEEDED)'.split())))
gpu:
	@for python in $(BIN)/python $(PYTHON); do \
	    if $$python -c "$(HAS_ALL)" 2>/dev/null; then exec $$python -m bench.gpu --device $(DEVICE) --out $(OUT); fi; \
	done; make install && $(BIN)/python -m bench.gpu --device $(DEVICE) --out $(OUT)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

# docs/flags.md, from the same texts as --help.
docs: install
	$(BIN)/python -m util.cli.reference

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO)
