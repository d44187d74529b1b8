# These commands do everything on a machine with Python 3.10 or newer, a C++17 compiler and make.

PYTHON ?= python3
BIN := .venv/bin
RUN ?=

.PHONY: demo test test-long sanitize docs notebook wheel install clean

demo: install  ## Deliberate Practice against static data on the embedded generator, about two minutes on two cores
	$(BIN)/dpfast run fashion --overwrite $(RUN)

# Two processes of one thread each, on a machine of two cores; the tests of a file share their fixtures.
test: install  ## lint, types and all tests but the long ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not long" --numprocesses 2 --dist loadfile --benchmark-disable

test-long: install  ## what takes longest: every family on two ranks, a wheel, the quickstart, the site in a browser
	$(BIN)/pytest -m long

SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so) $(shell $(CXX) -print-file-name=libstdc++.so)

# A level runs what a processor without AVX-512 or AVX2 would; `make test` runs the best that this one has.
LEVELS ?= x86-64 x86-64-v3

# What runs csrc at every size and option. Graphs, exports and schedulers call the same kernels once more.
SANITIZED := tests/ops \
	--ignore tests/ops/test_schedulers.py --ignore tests/ops/test_export.py \
	-k "(native or test_chunk_rows or test_crop or test_permutation) and not (compiles or registered or triton)"

sanitize: install  ## the native kernels' tests under AddressSanitizer and UBSan, on copies in build/sanitize
	$(MAKE) -j2 $(LEVELS:%=sanitize-%)

# Two builds at once would read each other's half-written list of sources: each has metadata of its own.
sanitize-%:
	rm -rf build/sanitize/$*
	mkdir -p build/sanitize/$*/metadata
	DPFAST_CXXFLAGS="$(SANITIZE) -O1 -g1 -march=$* -DDPFAST_PORTABLE" \
		$(BIN)/python setup.py -q egg_info --egg-base build/sanitize/$*/metadata \
		build --build-lib build/sanitize/$* --build-temp build/sanitize/$*/objects
	test -f build/sanitize/$*/dpfast/_native*.so
	cp -r tests pyproject.toml build/sanitize/$*
	cd build/sanitize/$* && LD_PRELOAD="$(LIBRARIES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		../../../$(BIN)/python -m pytest $(SANITIZED) -x --capture=sys

# The variable is that of mkdocs-material: without it a notice of its authors stands above every build.
docs: install  ## the documentation as a site in build/site, which needs no network; a broken link ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

notebook: install  ## the notebook's cells once more, and their outputs into it: a minute
	$(BIN)/python tools/run_notebook.py examples/deliberate_practice.ipynb

# The wheel is built from the sdist: what the sdist lacks or a checkout has left over shows in neither.
wheel: install  ## an sdist and the wheel that it builds, in dist
	$(BIN)/python -m build

install: .venv/installed

# The constraints pin a torch that has a CPU build; without them pip may take a CUDA build of several gigabytes.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info dpfast/*.so runs
