"""The Ray side of `embed_corpus.py`: topology, execution, estimate and summary."""
