# make demo   sets everything up and trains on real data, torch's loss against ours
# make test   sets everything up and runs the tests
#
# Both work in .venv. Where $(PYTHON) has torch, that torch is used; otherwise pip installs one.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint format clean

demo: .venv/installed
	$(BIN)/python examples/train_binary.py
	$(BIN)/python examples/which_loss.py
	$(BIN)/python examples/sentiment.py "a warm and funny film"

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: .venv/installed
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# A path file makes the torch of $(PYTHON) importable in .venv.
.venv/torch:
	$(PYTHON) -m venv .venv
	if site=$$($(PYTHON) -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null); \
	then echo "$$site" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python.pth"; \
	else $(BIN)/python -m pip install -q "torch>=2.10"; fi
	$(BIN)/python -m pip install -q "setuptools>=77" wheel "cmake>=3.24" ninja
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,bench,examples,lint]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fused_ce/*.so
