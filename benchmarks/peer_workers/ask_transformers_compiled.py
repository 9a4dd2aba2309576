"""transformers in bfloat16, its decoding steps compiled by torch with a cache of fixed size. Compiling, a minute or more, is
left out of the times: it falls into the first question, which is not counted."""

from __future__ import annotations

from peer_workers.ask_transformers import REQUIREMENTS, Transformers, prepare
from peer_workers.common import main

__all__ = ["REQUIREMENTS", "TITLE", "prepare"]

TITLE = "transformers, bf16, compiled"
#: Shares the environment of
ENVIRONMENT = "transformers"


class Compiled(Transformers):
    compiled = True


if __name__ == "__main__":
    main(prepare, Compiled)
