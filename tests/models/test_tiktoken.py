"""A tiktoken file as a tokenizer: cut as tiktoken cuts, told apart from damaged files."""

from __future__ import annotations

import base64
import itertools
import random
import re
import unicodedata
from pathlib import Path

import pytest
from tiny_qwen_vl import tiny_ranks, write_tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from edgevlm.errors import CheckpointError
from edgevlm.models.qwen_vl import ADDED, PATTERN, build_tokenizer
from edgevlm.models.tiktoken import read_ranks, split_token, tokenizer_from_ranks

BYTES = {bytes([byte]): byte for byte in range(256)}


def cut(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, word by word: a word that is a token, else the lowest rank of neighbours first, the left of equals."""
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str(unicodedata.normalize("NFC", text))
    ids = []
    for word, _ in words:
        pieces = [bytes([byte]) for byte in word.encode()]
        if word.encode() in ranks:
            pieces = [word.encode()]
        while joins := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in ranks]:
            _, i = min(joins)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        ids += [ranks[piece] for piece in pieces]
    return ids


def random_ranks(seed: int, alphabet: bytes, joins: int) -> dict[bytes, int]:
    """Tokens that are joins of two earlier ones, periodic ones among them, so that many have more than one split."""
    rng, ranks = random.Random(seed), dict(BYTES)
    pieces = [bytes([byte]) for byte in alphabet]
    while len(ranks) < 256 + joins:
        new = rng.choice(pieces) + rng.choice(pieces)
        if new not in ranks and len(new) < 9:
            ranks[new] = len(ranks)
            pieces.append(new)
    return ranks


@pytest.mark.parametrize(
    ("seed", "alphabet"), [(0, b"ab"), (1, b"a"), (2, b" \n"), (3, b"abc"), (4, "é的".encode()), (5, b"=-")]
)
def test_any_vocabulary_is_cut_as_tiktoken_cuts(seed: int, alphabet: bytes) -> None:
    ranks = random_ranks(seed, alphabet, 7 if len(alphabet) == 1 else 60)
    tokenizer = tokenizer_from_ranks(ranks, PATTERN, [])
    rng = random.Random(seed)
    for _ in range(1500):
        text = bytes(rng.choice(alphabet) for _ in range(rng.randint(1, 24))).decode(errors="ignore")
        assert tokenizer.encode(text).ids == cut(text, ranks), text


def test_a_token_that_no_join_reaches_is_still_a_word() -> None:
    ranks = {**BYTES, b"xyz": 256}
    assert split_token(b"xyz", ranks) is None
    assert split_token(b"x", ranks) is None
    assert split_token(b"xyz", {**ranks, b"yz": 257}) == (b"x", b"yz")
    tokenizer = tokenizer_from_ranks(ranks, PATTERN, [])
    assert tokenizer.encode("xyz").ids == [256]
    assert tokenizer.encode("xyzx").ids == cut("xyzx", ranks) == [120, 121, 122, 120]


HARD = [
    "don't I'LL we'Ve it'ſ rock'n'roll", "1234567890 ١٢٣ Ⅻ ½ 3.14", "   \n\n  \r\n x\t\ty  \n", "a\u0301e\u0301 ﬁ Ω Å",
    "你好，世界！", "👨‍👩‍👧 🇩🇪 é", "\u00a0\u2003x\u3000y\u180e\u0085z\u2028", "====----____", " " * 300, "a" * 300, "", "\0",
    "\u1100\u1161\u11a8 각", "user\n\n\nassistant", "The cat's (536,509),(588,602)", "a  b\n \n c",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiktoken")
    write_tiktoken(path / "qwen.tiktoken", tiny_ranks(360))
    return path


def test_hard_texts(folder: Path) -> None:
    ranks, tokenizer = read_ranks(folder / "qwen.tiktoken"), Tokenizer.from_str(build_tokenizer(folder))
    for text in HARD:
        ids = tokenizer.encode(text).ids
        assert ids == cut(text, ranks), text
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_package_agrees(folder: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks, tokenizer = read_ranks(folder / "qwen.tiktoken"), Tokenizer.from_str(build_tokenizer(folder))
    special = {token: number for number, token in enumerate(ADDED, len(ranks))}
    theirs = tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    for text in [*HARD, "<|im_start|>user\nPicture 1: <img><imgpad></img>\nWhat?<|im_end|>\n", "<ref>a</ref><box>(1,2)</box>"]:
        assert tokenizer.encode(text).ids == theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all"), text


def test_added_tokens_follow_the_ranks(folder: Path) -> None:
    tokenizer = Tokenizer.from_str(build_tokenizer(folder))
    numbers = {token: tokenizer.token_to_id(token) for token in ADDED}
    assert list(numbers.values()) == list(range(360, 360 + 217))
    # As published: 151643 ranks, then <|endoftext|>, …, <ref> 151851, <img> 151857, </img> 151858, <imgpad> 151859.
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850,
                 "<ref>": 151851, "</quad>": 151856, "<img>": 151857, "</img>": 151858, "<imgpad>": 151859}  # fmt: skip
    assert {token: number - 360 + 151643 for token, number in numbers.items() if token in published} == published
    text = "<ref>the cat</ref><box>(1,2),(3,4)</box><|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.removesuffix("<|im_end|>")


def test_added_tokens_are_not_normalized() -> None:
    tokenizer = tokenizer_from_ranks(BYTES, PATTERN, [AddedToken("<e\u0301>", special=True, normalized=False)])
    assert tokenizer.encode("x<e\u0301>").ids == [120, 256]


@pytest.mark.parametrize(("content", "expected"), [
    (b"not base64 !!\n", "is no tiktoken file"), (b"QQ==\n", "is no tiktoken file"), (b"QQ== one\n", "is no tiktoken file"),
    (b"\xff\xfe", "is no tiktoken file"), (b"", "0 of the 256 single bytes"), (b"QQ== 0\n", "1 of the 256 single bytes"),
])  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "x.tiktoken").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        read_ranks(tmp_path / "x.tiktoken")


@pytest.mark.parametrize(("line", "expected"), [
    (b"YWI= 300\n", "do not count from 0"), (b"YWI= 3\n", "do not count from 0"), (b"QQ== 256\n", "257 lines, 256 different"),
])  # fmt: skip
def test_ranks_with_a_gap_or_twice(tmp_path: Path, line: bytes, expected: str) -> None:
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in BYTES.items()]
    (tmp_path / "x.tiktoken").write_bytes(b"".join(lines) + line)
    with pytest.raises(CheckpointError, match=expected):
        read_ranks(tmp_path / "x.tiktoken")
