"""What `benchmarks/peers.py` runs in each peer's own environment: one file for each peer."""
