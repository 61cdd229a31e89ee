"""The paper in small: ConSPO, its baselines and its ablations on two tasks that two cores can train.

PYTHONPATH=examples python -m paper          # all runs that are not there yet, then the report; `make paper` does this
"""
