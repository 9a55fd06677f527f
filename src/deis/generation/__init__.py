"""Samples by the ten thousand, in shards that survive being killed; see `generate`."""
