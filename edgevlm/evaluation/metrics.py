"""Metrics: what each answer scores, and what all of them come to, as published for each benchmark.

- `exact`: the answer is one of the right ones, apart from blanks around it.
- `contains`: the words of a right answer stand in it together; case and punctuation aside.
- `pope`: POPE's own reading of an answer as yes or no, and what it reports (RUCAIBox/POPE, evaluate.py).
- `vqa`: VQA's soft accuracy over ten answers (GT-Vision-Lab/VQA, vqaEval.py).
- `cider`: CIDEr-D (Vedantam et al., 2015), by pycocoevalcap 1.2, the COCO caption challenge's scorer as a package. For this
  metric it needs numpy and no Java. (aac-metrics 0.6 is newer, and needs torch; no other package that is maintained has it.)
  Its tokenizer is Stanford's and does need Java; `tokenize_caption` stands in for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import MissingDependencyError
from .records import Item

__all__ = [
    "METRICS",
    "VQA_LEAST",
    "Metric",
    "is_exact",
    "mean_by_kind",
    "normalize_vqa",
    "read_yes_no",
    "score_vqa",
    "tokenize_caption",
]

#: The fewest right answers that VQA's accuracy can be full with: one that is left out, and three others.
VQA_LEAST = 4


@dataclass(frozen=True)
class Metric:
    """`score` gives each item's score from the answers' texts by item id, `summarize` what all come to, in the units of the
    literature and the one to judge by first; `problem` what is wrong with the right answers of an item, or ""."""

    score: Callable[[Sequence[Item], Mapping[str, str]], dict[str, float]]
    summarize: Callable[[Sequence[Item], Mapping[str, str], Mapping[str, float]], dict[str, float]]
    problem: Callable[[Sequence[str]], str] = lambda _: ""


def mean_by_kind(items: Iterable[Item], scores: Mapping[str, float]) -> dict[str, float]:
    """100 times the mean score of each kind, in order of appearance; items without a kind are left out."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for item in items:
        if item.kind:
            found[item.kind].append(scores[item.id])
    return {kind: 100 * sum(values) / len(values) for kind, values in found.items()}


def _each(score: Callable[[str, Sequence[str]], float]) -> Callable[[Sequence[Item], Mapping[str, str]], dict[str, float]]:
    return lambda items, texts: {item.id: float(score(texts[item.id], item.references)) for item in items}


def _mean(name: str) -> Callable[[Sequence[Item], Mapping[str, str], Mapping[str, float]], dict[str, float]]:
    return lambda items, _, scores: {name: 100 * sum(scores[item.id] for item in items) / len(items)}


# --------------------------------------------------------------------------------------------------- words


def is_exact(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is a right one, apart from blanks around it."""
    return answer.strip() in {reference.strip() for reference in references}


def _contains(answer: str, references: Sequence[str]) -> bool:
    def words(text: str) -> str:
        return " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])

    return any(words(reference) in words(answer) for reference in references if words(reference).strip())


# ---------------------------------------------------------------------------------------------------- POPE


def read_yes_no(answer: str) -> str:
    """An answer as POPE reads it: "no" where its first sentence has the word No, no or not, else "yes", whatever it says."""
    words = answer.split(".")[0].replace(",", "").split()
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _summarize_pope(items: Sequence[Item], texts: Mapping[str, str], scores: Mapping[str, float]) -> dict[str, float]:
    """ "yes" is what is looked for. What would be divided by zero is 0."""
    said = [(read_yes_no(texts[item.id]) == "yes", item.references[0] == "yes") for item in items]
    hits, claims, there = said.count((True, True)), sum(s for s, _ in said), sum(t for _, t in said)
    precision, recall = hits / max(claims, 1), hits / max(there, 1)
    return {
        "accuracy": 100 * sum(s == t for s, t in said) / len(said),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "F1": 100 * 2 * hits / max(claims + there, 1),
        "yes ratio": 100 * claims / len(said),
    }


def _pope_problem(references: Sequence[str]) -> str:
    return "" if list(references) in (["yes"], ["no"]) else f"its answer is {list(references)}, neither yes nor no"


# ----------------------------------------------------------------------------------------------------- VQA

#: The contractions that vqaEval.py knows: each is also recognised with one apostrophe left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905
_CONTRACTIONS = {
    **{word[:at] + word[at + 1 :]: word for word in _CONTRACTED for at, mark in enumerate(word) if mark == "'"},
    "somebody'd": "somebodyd",  # as it stands there
}
_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_COUNTING)}}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalize_vqa(text: str) -> str:
    """An answer as vqaEval.py compares it: punctuation, case, number words, articles, contractions, in that order.

    A mark beside a blank is dropped, as all marks are where a comma stands between digits; others become blanks.
    """
    text = _flat(text)
    drop_all, marked = re.search(r"\d,\d", text) is not None, text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        marked = marked.replace(mark, "" if beside_blank or drop_all else " ")
    words = re.sub(r"\.(?!\d)", "", marked, count=32).lower().split()  # there, a flag stands where the count belongs: 32
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def score_vqa(answer: str, references: Sequence[str]) -> float:
    """VQA's accuracy: of each choice of all right answers but one, a third for each that agrees, at most 1; their mean.

    As in vqaEval.py, answers are normalised only where the people did not all write the same.
    """
    said, given = _flat(answer), [_flat(reference) for reference in references]
    if len(set(given)) > 1:
        said, given = normalize_vqa(said), [normalize_vqa(reference) for reference in given]
    agree = sum(reference == said for reference in given)
    return sum(min(1.0, (agree - (reference == said)) / 3) for reference in given) / len(given)


def _vqa_problem(references: Sequence[str]) -> str:
    few = f"it has {len(references)} answers; VQA's accuracy needs {VQA_LEAST} at least, and is made for ten"
    return few if len(references) < VQA_LEAST else ""


# --------------------------------------------------------------------------------------------------- CIDEr

#: Longest first: numbers, abbreviations with dots, words (hyphens and apostrophes within), dashes and dots, other marks.
_TOKEN = re.compile(r"\d+(?:[.,:]\d+)+|(?:[^\W\d_]\.){2,}|[^\W_]+(?:[-'’&][^\W_]+)*|-{2,}|\.{2,}|[^\w\s]|_")
_CLITIC = re.compile(r"(?<=\w)(?=n['’]t$)|(?<=[^\W_])(?=['’](?:s|m|d|re|ve|ll)$)")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = set(".?!,:;-'’`\"“”‘…")


def tokenize_caption(text: str) -> str:
    """A caption in tokens, one blank between them, much as coco-caption's PTBTokenizer writes it: in lower case, clitics apart
    ("isn't" is "is n't"), punctuation dropped, brackets spelt out.

    Stanford's tokenizer, which that is, differs where it knows English: it keeps the dot of "mr.", splits "gonna", and keeps
    "and/or" and web addresses whole.
    """
    tokens: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        if token == "cannot":
            tokens += ["can", "not"]
        elif not set(token) <= _DROPPED:
            tokens += _CLITIC.split(_BRACKETS.get(token, token.replace("’", "'")))
    return " ".join(tokens)


def _score_cider(items: Sequence[Item], texts: Mapping[str, str]) -> dict[str, float]:
    """0 to 10 an item. What is rare is what few of these items' captions have, so scores depend on the items they are among."""
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError as exc:
        raise MissingDependencyError(
            f"CIDEr needs pycocoevalcap, which is not installed ({exc}). `pip install 'edgevlm[eval]'` brings it."
        ) from exc
    scorer = CiderScorer()
    for item in items:
        scorer += (tokenize_caption(texts[item.id]), [tokenize_caption(reference) for reference in item.references])
    _, scores = scorer.compute_score()
    return {item.id: float(score) for item, score in zip(items, scores, strict=True)}


def _cider_problem(references: Sequence[str]) -> str:
    return "" if all(tokenize_caption(reference) for reference in references) else "a caption of it has no word"


METRICS: Mapping[str, Metric] = {
    "exact": Metric(_each(is_exact), _mean("exact match")),
    "contains": Metric(_each(_contains), _mean("contained")),
    "pope": Metric(
        lambda items, texts: {item.id: float(read_yes_no(texts[item.id]) == item.references[0]) for item in items},
        _summarize_pope,
        _pope_problem,
    ),
    "vqa": Metric(_each(score_vqa), _mean("accuracy"), _vqa_problem),
    "cider": Metric(_score_cider, _mean("CIDEr"), _cider_problem),
}
