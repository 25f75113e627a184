"""Other data formats into shards."""
