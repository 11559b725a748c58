"""One script per question, one shared harness; `python -m benchmarks` lists them."""
