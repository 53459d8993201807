"""Embedding a corpus: the plan of its shards, decoding and encoding one of them, updating what is there."""
