"""What a plan executes that joins towers, deduplication, codecs, number formats and memory tiers."""
