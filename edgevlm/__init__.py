"""EdgeVLM: vision-language models from Hugging Face checkpoints to robots.

    from edgevlm import VLM
    vlm = VLM.load("bundle")
    print(vlm.generate("How many cubes?", images=["scene.png"]).text)

Importing this package, and running a model, needs neither torch nor transformers.
"""

from __future__ import annotations

from .errors import EdgeVLMError
from .vlm import VLM, Piece, Reply, Stream, Timings

__all__ = ["VLM", "EdgeVLMError", "Piece", "Reply", "Stream", "Timings", "__version__"]

__version__ = "0.1.0"
