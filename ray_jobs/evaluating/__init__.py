"""The Ray side of `evaluate_retrieval.py`."""
