.PHONY: demo demo-stage2 test test-slow check format clean

demo: ## the whole job on a small built-in world
	@scripts/setup.sh demo
	@.venv/bin/python -m llava_align demo

demo-stage2: ## after it: the language model learns dialogues about the same pictures
	@scripts/setup.sh demo
	@.venv/bin/python -m llava_align demo-stage2

test: check ## ruff, mypy and every test but the slow ones
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder -m "not slow"

test-slow: check
	@.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadscope --no-loadscope-reorder

check:
	@scripts/setup.sh test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy --num-workers 2

format:
	@scripts/setup.sh test
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:
	rm -rf .venv demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
