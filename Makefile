# Everything sets itself up: only Python 3.11+, make and gcc are needed.
PY := .venv/bin/python
SHOP ?= shop
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: run test test-all check bench lock clean
run: .venv/ready
	test -f $(SHOP)/coterie.toml || .venv/bin/coterie init --example $(SHOP)
	.venv/bin/coterie fit $(SHOP)
	if grep -q '^\[knowledge\.' $(SHOP)/coterie.toml; then .venv/bin/coterie learn $(SHOP); fi
	.venv/bin/coterie serve $(SHOP)

# Two processes share the files of tests; each needs a core and 2 GB. For one test: .venv/bin/python -m pytest -k NAME
test: .venv/ready-test
	$(PY) -m pytest -m "not slow" -q -n 2 --dist loadfile --durations=15

test-all: .venv/ready-test .venv/adapters
	COTERIE_EXPLORE=1 $(PY) -m pytest -q

check: .venv/ready-test
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# Hours on 2 cores; each also runs alone and takes --quick (docs/benchmarks.md).
BENCHES = tuning serving methods routing retrieval support groundedness graph sql businesses privacy desk \
	desk_intents desk_load switch conversation anatomy
bench: .venv/ready-test
	for name in $(BENCHES); do $(PY) benchmarks/$$name.py --record || exit; done

# Torch goes first and alone: plain PyPI torch on Linux brings gigabytes of CUDA, so set
# TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu" on a machine without a GPU.
.venv/ready: pyproject.toml requirements.lock
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install -q $(TORCH_ARGS) torch==2.13.0
	$(PY) -m pip install -q --no-deps --require-hashes -r requirements.lock
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

.venv/ready-test: .venv/ready requirements-test.lock
	$(PY) -m pip install -q --no-deps --require-hashes -r requirements-test.lock
	touch $@

# Needs uv (pip install uv). Run after changing the dependencies in pyproject.toml.
lock:
	uv pip compile -q pyproject.toml -o requirements.lock
	uv pip compile -q pyproject.toml --extra test --extra bench -c requirements.lock -o requirements-test.lock

# AdapterHub's library needs an older transformers than ours: it stands apart, for one group of tests.
.venv/adapters: .venv/ready-test
	$(PY) -m pip install -q --no-deps --target $@ adapters==1.2.0 transformers==4.51.3 tokenizers==0.21.4 huggingface_hub==0.36.0

clean:
	rm -rf .venv
