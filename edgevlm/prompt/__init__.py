"""From a question to token ids with places for the pictures, and from generated ids back to streamed text.

    request = normalize_request("What is on the table?", [picture])
    builder = PromptBuilder(Tokenizer.from_folder(folder), template, "<image>", 4, lambda index: 36)
    prompt = builder.build(request)                    # prompt.ids, prompt.places, prompt.text
    stream = TextStream(builder.tokenizer)             # stream.push(token_id) …, stream.finish()

For ordinary text the ids are those of the checkpoint's Hugging Face processor. Where a user's text spells a control
token ("</s>", "<image>"), it stays text: only the chat template can write control tokens.

It does not know pixels, models or end-of-sequence ids: a picture is any object that is not a `str`, how many
places it takes is the caller's function, and when to stop is the generation configuration's business.
"""

from __future__ import annotations

from .builder import Prompt, PromptBuilder
from .request import ImagePart, Message, Request, TextPart, Video, normalize_request
from .template import ChatTemplate
from .tokenizer import TextStream, Tokenizer

__all__ = [
    "ChatTemplate",
    "ImagePart",
    "Message",
    "Prompt",
    "PromptBuilder",
    "Request",
    "TextPart",
    "TextStream",
    "Tokenizer",
    "Video",
    "normalize_request",
]
