"""What `benchmarks/peers.py` runs in each peer's own environment: one file for each peer."""

import sys
from pathlib import Path

# The benchmarks beside this folder have names that packages' own modules have too.
sys.path[:] = [place for place in sys.path if not place or Path(place).resolve() != Path(__file__).resolve().parent.parent]
