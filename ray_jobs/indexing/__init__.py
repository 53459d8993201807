"""The Ray side of `build_index.py`."""
