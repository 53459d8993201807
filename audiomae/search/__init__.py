"""Finding vectors: embedding shards, the index over them, and published releases."""
