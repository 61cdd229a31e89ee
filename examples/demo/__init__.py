"""The parts of the demo: policies, tasks, sampling, warm-up, records. `examples/train.py` puts them together."""
