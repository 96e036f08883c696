"""What a tower plan executes: the exchange in two steps, lookups of a rank's shards, tower modules."""
