# Each target sets up what it needs; when nothing has changed, that takes no time.
# Without bytecode every process compiles its imports anew, seconds each.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo test check bench lock clean setup

demo: setup ## collect, train, evaluate and register a policy (under 20 minutes on two cores)
	@.venv/bin/flywheel nightly demo

test: setup ## everything that can be checked without a GPU
	@.venv/bin/pytest

check: setup ## style, types, and that imports point one way
	@.venv/bin/ruff check .
	@.venv/bin/lint-imports
	@.venv/bin/pyright --pythonpath .venv/bin/python

bench: setup ## each claim of speed, beside its peer; what was measured goes to docs/results
	@.venv/bin/python benchmarks

lock: setup ## resolve pyproject.toml anew
	@.venv/bin/uv pip compile pyproject.toml --extra dev --universal --generate-hashes --no-emit-index-url --no-header \
		--python-version 3.12 --quiet -o requirements.lock

clean: ## caches; the store, the environment and what the services keep stay
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.tools/*' -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .import_linter_cache .hypothesis build ./*.egg-info

setup:
	@./setup.sh
