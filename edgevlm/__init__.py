"""EdgeVLM: vision-language models from Hugging Face checkpoints to robots.

    from edgevlm import VLM
    vlm = VLM.load("bundle")
    print(vlm.generate("How many cubes?", images=["scene.png"]).text)

Importing this package, and running a model, needs neither torch nor transformers.
"""

from __future__ import annotations

from .boxes import Box
from .errors import EdgeVLMError
from .prompt import Video
from .vlm import VLM, Piece, Reply, Seen, Stream, Timings

__all__ = ["VLM", "Box", "EdgeVLMError", "Piece", "Reply", "Seen", "Stream", "Timings", "Video", "__version__"]

__version__ = "0.1.0"
