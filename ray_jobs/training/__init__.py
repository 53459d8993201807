"""The Ray side of `train.py`: the feature cache and the run."""
