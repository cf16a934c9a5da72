# What a newcomer types: each word is a few lines over CMake, CTest and the scripts in tools/.
# SPDX-License-Identifier: Apache-2.0
MAKEFLAGS += --no-print-directory
JOBS ?= $(shell nproc)
BUILD ?= build
PREFIX ?= /usr/local
MODEL ?=
DEVICE ?= cpu
PROBLEMS ?= bench/problems/smoke.txt
SECONDS ?= 600

# What NVRTC compiled of one build's tests is known to the next.
CTEST = QKV_NVRTC=$$(tools/nvrtc.sh) QKV_TEST_CACHE=$(abspath $(BUILD))/compiled \
	ctest --output-on-failure --no-label-summary -j $(JOBS) --test-dir
C_FILES = $(shell git ls-files --cached --others --exclude-standard '*.[ch]' '*.cu' '*.cuh')

# $(call configure_and_build,FOLDER,CMAKE OPTIONS,BUILD OPTIONS): the log of a configuration is shown if it fails.
configure_and_build = @cmake -S . -B $(1) $(2) >$(1).log 2>&1 && rm $(1).log || { cat $(1).log; exit 1; }; \
	cmake --build $(1) -j $(JOBS) $(3)

.PHONY: build
build: ## library, qkv tool and examples, in build/
	@tools/setup.sh build
	$(call configure_and_build,$(BUILD),-DQKV_BUILD_TESTS=OFF)

.PHONY: demo
demo: build ## a real model answers a batch of prompts; MODEL=file.gguf takes another, DEVICE=cuda a GPU
	@tools/setup.sh demo
	@tools/demo.sh $(BUILD)/qkv-generate "$(DEVICE)" "$(MODEL)"

# Kernels for GPUs are compiled where no sanitizer slows NVRTC, and what is known of them is read by later runs.
# Of the stages that follow, each by itself leaves cores idle; fuzzers, which have seconds, run by themselves.
.PHONY: check
check: begin-python-env ## all of it; the tests' summary comes last
	$(call configure_and_build,$(BUILD),-DQKV_BUILD_TESTS=ON -DQKV_BUILD_PYTHON=ON)
	@$(CTEST) $(BUILD) -R '^test_cuda_compile$$'
	@$(MAKE) -j2 --output-sync=target check-asan lint check-clang check-tsan check-python check-aarch64 docs
	@$(MAKE) check-fuzz
	@$(CTEST) $(BUILD)

.PHONY: setup-check
setup-check:
	@tools/setup.sh check
	@tools/nvrtc.sh >/dev/null

.PHONY: lint
lint: setup-check ## formatting, include directions, clang-tidy
	@tools/layers.sh --self-test
	@tools/layers.sh
	@clang-format --dry-run -Werror $(C_FILES)
	@tools/tidy.sh $(BUILD)-tidy $(JOBS)

.PHONY: format
format: ## clang-format over the tree
	@clang-format -i $(C_FILES)

.PHONY: check-clang
check-clang: setup-check ## everything compiles with clang too; only kernels, whose flags are their own, optimised
	$(call configure_and_build,$(BUILD)-clang,-DCMAKE_C_COMPILER=clang -DCMAKE_C_FLAGS_RELEASE='-O0 -DNDEBUG')

.PHONY: check-asan
check-asan: setup-check ## all tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call configure_and_build,$(BUILD)-asan,-DQKV_SANITIZE=address$(comma)undefined)
	@$(CTEST) $(BUILD)-asan -LE no-sanitizer
comma := ,

.PHONY: check-tsan
check-tsan: setup-check ## the tests that share contexts and threads, under ThreadSanitizer
	$(call configure_and_build,$(BUILD)-tsan,-DQKV_SANITIZE=thread,--target tests_of_threads)
	@$(CTEST) $(BUILD)-tsan -L threads

.PHONY: check-aarch64
check-aarch64: setup-check ## compiles for AArch64 with NEON, and runs what an emulator can
	@tools/check_aarch64.sh $(BUILD)-aarch64 $(JOBS)

.PHONY: check-fuzz
check-fuzz: setup-check ## 15 seconds of each fuzzer
	@tools/fuzz.sh $(BUILD)-fuzz 15

.PHONY: begin-python-env
begin-python-env: setup-check # its downloads are under way while other things compile
	@(tools/python_env.sh >/dev/null 2>&1 &)

.PHONY: check-python
check-python: setup-check ## the Python package, in an environment with torch that is made once
	$(call configure_and_build,$(BUILD),-DQKV_BUILD_TESTS=ON -DQKV_BUILD_PYTHON=ON,--target qkv_python)
	@PYTHONPATH=$(abspath $(BUILD))/python $$(tools/python_env.sh) -m pytest -q tests/python

.PHONY: check-model
check-model: build ## the demo's model against an independent forward pass in NumPy; some minutes
	@tools/setup.sh check-model
	@tools/check_model.sh $(BUILD)/qkv-generate "$(DEVICE)" "$(MODEL)"

.PHONY: docs
docs: setup-check ## API reference into build/docs; a warning is an error
	@mkdir -p $(BUILD)
	@QKV_DOCS=$(BUILD)/docs doxygen docs/Doxyfile

.PHONY: bench
bench: build ## verifies and times every problem of PROBLEMS
	@$(BUILD)/qkv bench --file $(PROBLEMS)

.PHONY: check-gpu
check-gpu: ## the tests on this machine's GPU, and some of them under compute-sanitizer; logs in BUILD-gpu
	$(call configure_and_build,$(BUILD),-DQKV_BUILD_TESTS=ON)
	@tools/gpu.sh $(BUILD) $(BUILD)-gpu tests
	@tools/gpu.sh $(BUILD) $(BUILD)-gpu sanitize

.PHONY: bench-gpu
bench-gpu: build ## verifies and times bench/problems/gpu.txt on this machine's GPU; results in BUILD-gpu
	@tools/gpu.sh $(BUILD) $(BUILD)-gpu bench

.PHONY: fuzz
fuzz: ## ten minutes of each fuzzer, or SECONDS=n; needs clang
	@tools/fuzz.sh $(BUILD)-fuzz $(SECONDS)

.PHONY: install
install: build ## into PREFIX (/usr/local)
	@cmake --install $(BUILD) --prefix $(PREFIX)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: clean
clean: ## removes the build folders
	@rm -rf $(BUILD) $(BUILD)-*
