"""Of the answers themselves: how diverse they are, and what alignment cost on other text and tasks."""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .crossed import mean
from .overoptimisation import ratio_of_means
from .records import Estimate, Record
from .tables import Clusters, finite


@dataclass(frozen=True)
class Diversity(Record):
    """Diversity of a set of texts: shares of different n-grams, self-BLEU (1: all alike), entropy of words in nats."""

    distinct_1: float
    distinct_2: float
    self_bleu: float | None
    entropy: float
    n_texts: int
    n_words: int


@dataclass(frozen=True)
class AlignmentTax(Record):
    """After less before: `nll` per token in nats, the perplexities and their ratio, and task scores; 0 is no tax."""

    nll: Estimate
    perplexity_before: float
    perplexity_after: float
    ratio: float
    ratio_ci: tuple[float, float]
    tasks: dict[str, Estimate]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words as a share of all n-grams of a set of texts.

    It falls as texts get more or longer: compare sets of equal size, and look at the lengths.

    Args:
        texts: split into words at white space.
        n: words in a row.

    Source:
        Li et al. 2016 (arXiv:1510.03055).

    >>> distinct_n(["a b a b", "a b"], n=2)  # ab ba ab ab
    0.5
    """
    counts = _pooled(texts, n)
    return len(counts) / counts.total()


def entropy(texts: Sequence[str], n: int = 1) -> float:
    """Entropy in nats of the distribution of n-grams of words in a set of texts, -Σ p log p.

    The plug-in estimate; too low by about (different n-grams)/(2 n-grams). For whole answers count them: n=0.

    Args:
        texts: split into words at white space.
        n: words in a row; 0 takes each text as one symbol.

    Source:
        Shannon 1948; the bias: Miller 1955.

    >>> round(entropy(["a b", "a c"]), 4), entropy(["yes", "yes"], n=0)
    (1.0397, 0.0)
    """
    counts = Counter(texts) if n == 0 and texts else _pooled(texts, n)
    share = np.array(list(counts.values())) / counts.total()
    return float(abs((share * np.log(share)).sum()))


def self_bleu(texts: Sequence[str], max_n: int = 4) -> float:
    """Mean BLEU of each text against all others: 1 where all are the same, near 0 where they share nothing.

    BLEU = min(1, e^{1 - r/c}) Π_n p_n^{1/max_n}, with p_n the n-grams that some other text holds as often, c the length
    and r the length of the other text nearest to it (the shorter on a tie). A p_n of 0 counts as 0.1 of an n-gram; a
    text with fewer than max_n words has only the shorter n-grams.

    Args:
        texts: at least two, split into words at white space.
        max_n: longest n-gram.

    Source:
        Zhu et al. 2018 (arXiv:1802.01886); Papineni et al. 2002; smoothing: method 1 of Chen & Cherry 2014.

    >>> self_bleu(["the cat sat down", "the cat sat down"]), round(self_bleu(["a b", "a c"], max_n=1), 3)
    (1.0, 0.5)
    """
    words = [text.split() for text in texts]
    if len(words) < 2 or not all(words):
        raise ValueError("self-BLEU needs at least two texts, none of them empty")
    lengths = sorted(map(len, words))
    grams = [[_ngrams(text, n) for text in words] for n in range(1, max_n + 1)]
    highest = [_two_highest(counts) for counts in grams]
    score = []
    for i, text in enumerate(words):
        logs = []
        for n in range(1, min(max_n, len(text)) + 1):
            held = sum(
                min(count, highest[n - 1][gram][count == highest[n - 1][gram][0]])
                for gram, count in grams[n - 1][i].items()
            )
            logs.append(math.log(max(held, 0.1) / (len(text) - n + 1)))
        nearest = _nearest_other(lengths, len(text))
        score.append(min(1.0, math.exp(1 - nearest / len(text))) * math.exp(sum(logs) / len(logs)))
    return sum(score) / len(score)


def diversity(texts: Sequence[str]) -> Diversity:
    """Distinct-1 and -2, self-BLEU and the entropy of words of one set of texts; empty texts are left out of self-BLEU.

    Args:
        texts: the answers of one run, or the samples of one prompt.

    Source:
        `distinct_n`, `self_bleu`, `entropy`.

    >>> found = diversity(["a b c", "a b d"])
    >>> round(found.distinct_1, 3), found.distinct_2, found.n_texts, found.n_words
    (0.667, 0.75, 2, 6)
    """
    filled = [text for text in texts if text.split()]
    longer = [text for text in filled if len(text.split()) > 1]
    return Diversity(
        distinct_1=distinct_n(filled, 1), distinct_2=distinct_n(longer, 2) if longer else 1.0,
        self_bleu=self_bleu(filled) if len(filled) > 1 else None, entropy=entropy(filled),
        n_texts=len(texts), n_words=sum(len(text.split()) for text in texts),
    )  # fmt: skip


def alignment_tax(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    tokens: npt.ArrayLike,
    *,
    tasks: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]] | None = None,
    clusters: Clusters = None,
    level: float = 0.95,
) -> AlignmentTax:
    """What alignment cost on held-out text and tasks: paired differences, after less before.

    nll = Σ_i (nll_after,i - nll_before,i) / Σ_i tokens_i; perplexity = exp(Σ nll / Σ tokens); their ratio is exp(nll).

    Args:
        before: negative log-likelihoods of the texts under the start, in nats, sums over tokens: (N,).
        after: under the method, (N,) or (S, N) by training seed.
        tokens: of the texts, (N,).
        tasks: by name, the scores before (M,) and after ((M,) or (S, M)) on the prompts of a held-out task.
        clusters: one label per text.
        level: of the intervals.

    Source:
        Askell et al. 2021 (arXiv:2112.00861) for the name; pairing as in `difference`.

    >>> tax = alignment_tax([10.0, 20.0], [11.0, 22.0], [5, 10], tasks={"sums": ([1, 1, 0], [1, 0, 0])})
    >>> round(tax.nll.estimate, 3), round(tax.ratio, 3), round(tax.tasks["sums"].estimate, 3)
    (0.2, 1.221, -0.333)
    """
    before_N, after_SN, tokens_N = (
        finite("before", before),
        np.atleast_2d(finite("after", after)),
        finite("tokens", tokens),
    )
    if before_N.ndim != 1 or not before_N.shape == tokens_N.shape == after_SN.shape[1:] or not (tokens_N > 0).all():
        raise ValueError(
            f"before has shape {before_N.shape}, after {after_SN.shape}, tokens {tokens_N.shape}: expected (texts,), "
            "(seeds, texts) and positive counts (texts,) of the same held-out texts"
        )
    tokens_SN = np.broadcast_to(tokens_N, after_SN.shape)
    nll = ratio_of_means(after_SN - before_N, tokens_SN, clusters, level, null=0.0)
    start = float(before_N.sum() / tokens_N.sum())
    return AlignmentTax(
        nll=nll, perplexity_before=math.exp(start), perplexity_after=math.exp(start + nll.estimate),
        ratio=math.exp(nll.estimate), ratio_ci=(math.exp(nll.ci[0]), math.exp(nll.ci[1])),
        tasks={
            name: mean(np.atleast_2d(finite(name, new) - finite(name, old)), level=level, null=0.0)
            for name, (old, new) in (tasks or {}).items()
        },
    )  # fmt: skip


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _pooled(texts: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    if n < 1:
        raise ValueError(f"n = {n}, {len(texts)} texts: need texts and n of at least 1")
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts += _ngrams(text.split(), n)
    if not counts:
        raise ValueError(f"no text has {n} words: there are no n-grams to count")
    return counts


def _two_highest(counts: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], tuple[int, int]]:
    """Of each n-gram its largest and second largest count in one text: the largest of all texts but one."""
    highest: dict[tuple[str, ...], tuple[int, int]] = {}
    for text in counts:
        for gram, count in text.items():
            first, second = highest.get(gram, (0, 0))
            highest[gram] = (count, first) if count > first else (first, max(second, count))
    return highest


def _nearest_other(lengths: list[int], length: int) -> int:
    """The length of another text nearest to this one's, the shorter on a tie; `lengths` are sorted."""
    place = bisect.bisect_left(lengths, length)
    others = lengths[max(0, place - 1) : place] + lengths[place + 1 : place + 2]
    return min(others, key=lambda other: (abs(other - length), other))
