"""A tiktoken file becomes a `tokenizer.json`, without tiktoken and without the code that comes with a checkpoint.

The file has one token a line, base64 of its bytes and its rank, and no list of merges: of all neighbours, those are joined
first whose join has the lowest rank (https://github.com/openai/tiktoken, src/lib.rs). The `tokenizers` library wants the
two pieces that each token is joined of: what the rule, applied to the token's own bytes, joins last. A token that the rule
never comes to is still used where it is a whole word: `ignore_merges`.

Only the workshop imports this module; the robot reads the `tokenizer.json`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ..errors import CheckpointError

__all__ = ["read_ranks", "split_token", "tokenizer_from_ranks"]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids. Raises CheckpointError where the file is damaged."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (OSError, ValueError, binascii.Error) as exc:
        raise CheckpointError(f"{path} is no tiktoken file, base64 and a rank on each line: {exc}.") from exc
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if len(ranks) != len(lines) or sorted(ranks.values()) != list(range(len(ranks))) or missing:
        raise CheckpointError(
            f"{path} is damaged: it has {len(lines)} lines, {len(ranks)} different tokens, ranks that "
            f"{'do' if sorted(ranks.values()) == list(range(len(ranks))) else 'do not'} count from 0 without a gap, and "
            f"{256 - len(missing)} of the 256 single bytes. Fetch it again."
        )
    return ranks


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two pieces that are joined last when the rule is applied to `token` alone; None where it never comes to that.

    Within a longer text the same two are joined: what is joined inside of the token does not depend on what is around it, as
    long as nothing is joined across its ends.
    """
    pieces, none = [bytes([byte]) for byte in token], len(ranks)
    while len(pieces) > 2:
        rank, first = min((ranks.get(pieces[i] + pieces[i + 1], none), i) for i in range(len(pieces) - 1))
        if rank == none:
            return None
        pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def tokenizer_from_ranks(ranks: Mapping[bytes, int], pattern: str, added: Sequence[AddedToken]) -> Tokenizer:
    """A byte-level BPE tokenizer of text in NFC, cut into words by the regular expression `pattern`; `added` tokens get the
    numbers behind the last rank."""
    character = _character_of_byte()

    def written(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if halves := split_token(token, ranks):
            merges.append((written(halves[0]), written(halves[1])))
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(added))
    return tokenizer


def _character_of_byte() -> list[str]:
    """Byte-level tokenizers write printable Latin-1 as itself, other bytes from U+0100 on (openai/gpt-2, encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
