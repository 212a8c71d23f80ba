# Two commands do everything on a fresh machine, environment included:
#   make demo    convert and verify the small real checkpoint that ships with the project, and let it continue a prompt
#   make test    the tests
# PYTHON chooses the interpreter (3.10 or newer), VENV where the environment goes. CUDA kernels are compiled, when nvcc
# is there, for the GPUs of this machine; MARLIN_CUDA_ARCHS=all compiles them for every GPU, as for a wheel.

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test test-web web-pictures space lint reference picture figures conversion-figures docs check wheels clean

demo: $(VENV)/.run
	$(RUN)/marlin-convert demo --force

test: $(VENV)/.dev
	$(RUN)/python -m pytest

# The web page in a real browser; needs Chromium (Debian, Ubuntu: apt install chromium).
test-web: $(VENV)/.web
	$(RUN)/python -m pytest tests/web

$(VENV)/.web: $(VENV)/.dev
	$(RUN)/python -m pip install -c constraints.txt "gradio[oauth]>=6.31" playwright
	@touch $@

# Pictures of the page, into docs/images.
web-pictures: $(VENV)/.web
	$(RUN)/python -m tools.web_pictures

# The web page as a Space, into build/space: `hf upload --repo-type space NAME build/space` publishes it.
space: $(VENV)/.run
	rm -rf build/space
	mkdir -p build/space
	cp space/* build/space
	cp -r marlin_convert build/space
	find build/space -name __pycache__ -prune -exec rm -r {} +
	rm -f build/space/marlin_convert/_cuda.so

lint: $(VENV)/.dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/clang-format --dry-run -Werror $(wildcard $(foreach kind,h c cpp cu cuh inl,kernels/*.$(kind) kernels/*/*.$(kind)))
	$(RUN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[bu]*.yml

# The pages that the program and stored figures write, in whole or in part.
GENERATED := docs/reference/cli.md docs/reference/exit-codes.md docs/guides/is-it-faster.md

reference: $(VENV)/.dev
	COLUMNS=100 $(RUN)/cog -r -P $(GENERATED)

# docs/images/demo.svg and conversion-run.svg, of runs of the program.
picture: $(VENV)/.dev
	$(RUN)/python tools/terminal_pictures.py

# All pictures of the documentation but those of the page: from the demo, and from figures that are kept.
figures: picture
	$(RUN)/python tools/figures.py

# How long a conversion takes on this machine, which must be quiet, beside `cp -r`: figures, table and picture.
conversion-figures: $(VENV)/.dev
	$(RUN)/python benchmarks/convert.py --verify --json benchmarks/results/conversion.json
	COLUMNS=100 $(RUN)/cog -r -P docs/guides/is-it-faster.md
	$(RUN)/python tools/figures.py

# The site, into site/: nothing is fetched, and a link that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --quiet

# dist/: a wheel for each machine type, for every Python and glibc 2.28 or newer, and the sdist (tools/wheels.py says what
# it needs). The CUDA library has every architecture, which takes some minutes.
wheels: $(VENV)/.dev
	$(RUN)/python tools/wheels.py

check: lint docs test
	COLUMNS=100 $(RUN)/cog --check -P $(GENERATED)

INSTALLED_FROM := pyproject.toml setup.py constraints.txt tools/environment.py $(wildcard kernels/* kernels/*/*)

$(VENV)/.run: $(INSTALLED_FROM)
	@$(PYTHON) tools/environment.py run $(VENV)

$(VENV)/.dev: $(INSTALLED_FROM)
	@$(PYTHON) tools/environment.py dev $(VENV)

clean:
	rm -rf $(VENV) build site demo-out *.egg-info marlin_convert/_cpu.so marlin_convert/_cuda.so
