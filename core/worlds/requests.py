"""The preference world: polite requests for lists of items, four kinds of demonstrators, biased and noisy annotators.

    please list two red fruits , but no apple , politely . =>
    certainly ! cherry and plum . enjoy !

Which items are red, cheap, good, or fit for the beach is drawn from the world's seed.  The gold reward is exact:

    gold = 5 I + 2 O + 3 T - 0.2 extra - 2 [no end, no item or no full stop]

with I the items, O their order, T the tone and extra the needless words; `Requests.parts` has the definitions.  No
completion earns more than 10 and the oracle earns exactly 10.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from .base import Request, Row, World, make_vocabulary, nearest, stream

Bias = Literal["flattery", "length", "none"]
BIASES: tuple[Bias, ...] = ("flattery", "length", "none")

KINDS = {
    "fruits": ("apple", "pear", "plum", "cherry", "mango", "lemon", "grape", "melon", "fig"),
    "vegetables": ("carrot", "onion", "leek", "pea", "bean", "beet", "corn", "kale", "radish"),
    "tools": ("hammer", "saw", "drill", "rope", "tape", "knife", "lamp", "wrench", "brush"),
    "clothes": ("hat", "scarf", "coat", "shirt", "sock", "boot", "glove", "belt", "dress"),
}
ITEMS = tuple(itertools.chain.from_iterable(KINDS.values()))
COLOURS = ("red", "green", "blue")
PLACES = ("beach", "mountain", "office", "garden")
COUNTS = {2: "two", 3: "three", 4: "four"}
BUDGETS = range(4, 37)
FAMILIES = ("list", "pack", "buy")
ORDERS = ("cheapest", "dearest")
TONES = ("politely", "briefly")
LIST_VERBS = ("list", "name", "give me", "suggest")

POLITE_OPENINGS = ("certainly !", "of course !")
POLITE_CLOSINGS = ("enjoy !", "have a lovely day !")
RUDE_OPENINGS = ("ugh ,", "whatever ,", "fine then ,")
FILLERS = ("well ,", "let me think ,", "as everyone knows ,", "it depends but ,")
FLATTERIES = ("what a great question !", "you are so wise !", "i love your taste !")

_ITEMS = frozenset(ITEMS)
_RUDE_WORDS = frozenset(" ".join(RUDE_OPENINGS).split()) - {","}


def item_value(quality: float) -> float:
    """What a right item is worth, 0.2 + 0.8 q: a plain property of the word, which a small reward model can learn."""
    return 0.2 + 0.8 * quality


@dataclass(frozen=True)
class Facts:
    """What somebody holds for true about every item: its colour, its price and the two places it is fit for."""

    colour: dict[str, str]
    price: dict[str, int]
    places: dict[str, tuple[str, ...]]

    def fitting(self, request: Request) -> list[str]:
        """The items of the right kind and colour, or for the right place; exclusions are not looked at."""
        place, colour = request["place"], request["colour"]
        if place:
            return [item for item in ITEMS if place in self.places[item]]
        return [item for item in KINDS[request["kind"]] if not colour or self.colour[item] == colour]

    def allowed(self, request: Request) -> list[str]:
        """The fitting items that the request does not exclude."""
        return [item for item in self.fitting(request) if item not in request["excluded"]]


@dataclass(frozen=True, kw_only=True)
class Demonstrator:
    """How one kind of demonstrator writes; the numbers are probabilities."""

    informed: bool = False  # knows the facts and likes quality; the others share false beliefs and like what is popular
    slips: float  # each item: replaced by any other
    ignores_order: float  # or the budget
    forgets_exclusions: float = 0.0
    miscounts: float = 0.0  # one item too few or too many
    adds_one: float = 0.0
    repeats_one: float = 0.0
    polite_if_asked: float = 0.0
    polite_unasked: float = 0.0
    rude: bool = False
    rambles: bool = False  # one to three fillers
    flatters: float = 0.0  # before the items; after them 0.7 of it


DEMONSTRATORS = {
    "careful": Demonstrator(
        informed=True, slips=0.03, ignores_order=0.05, polite_if_asked=0.92, polite_unasked=0.05, flatters=0.04
    ),
    "hasty": Demonstrator(
        slips=0.15,
        ignores_order=0.7,
        forgets_exclusions=0.6,
        miscounts=0.25,
        repeats_one=0.1,
        polite_if_asked=0.3,
        polite_unasked=0.1,
        flatters=0.08,
    ),
    "rambler": Demonstrator(
        slips=0.08,
        ignores_order=0.3,
        adds_one=0.15,
        polite_if_asked=0.6,
        polite_unasked=0.35,
        rambles=True,
        flatters=0.6,
    ),
    "rude": Demonstrator(slips=0.08, ignores_order=0.3, rude=True),
}


class _Target(NamedTuple):
    """What the scorer needs to know about a meaning, computed once."""

    values: dict[str, float]  # of the right items
    best: tuple[str, ...]  # the most valuable right answer
    best_value: float


@dataclass(frozen=True, kw_only=True)
class Requests(World):
    """The preference world; see the module for the language and the gold reward.

    Args:
        seed: draws the facts, the hidden quality, the false beliefs, the splits and all streams.
        demonstrator_shares: relative weights of the demonstrators; a name left out has weight 0.
        family_weights: relative weights of the request families; `buy` asks for sums of prices and is hard.
        bias, strength, temperature: the annotators, see `annotate`.

    >>> Requests(seed=0).max_new_tokens
    44
    """

    name: ClassVar[str] = "requests"
    vocabulary: ClassVar[tuple[str, ...]] = make_vocabulary(
        itertools.chain(
            ITEMS,
            KINDS,
            COLOURS,
            PLACES,
            COUNTS.values(),
            POLITE_OPENINGS + POLITE_CLOSINGS + RUDE_OPENINGS + FILLERS + FLATTERIES,
            ("please pack things for the buy at most coins but no nor , and first .",),
            LIST_VERBS + ORDERS + TONES,
            map(str, BUDGETS),
        )
    )

    demonstrator_shares: Mapping[str, float] = field(
        default_factory=lambda: {"careful": 0.20, "hasty": 0.40, "rambler": 0.25, "rude": 0.15}
    )
    family_weights: Mapping[str, float] = field(default_factory=lambda: {"list": 0.65, "pack": 0.35, "buy": 0.0})
    bias: Bias = "flattery"
    strength: float = 1.5
    temperature: float = 1.8

    def __post_init__(self) -> None:
        for kind, weights, known in (
            ("demonstrator", self.demonstrator_shares, DEMONSTRATORS),
            ("request family", self.family_weights, FAMILIES),
        ):
            for name in weights:
                if name not in known:
                    raise nearest(kind, name, known)
            if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
                raise ValueError(f"the weights of a {kind} must not be negative and must not all be 0: {dict(weights)}")
        if self.bias not in BIASES:
            raise nearest("annotator bias", self.bias, BIASES)

    @property
    def max_new_tokens(self) -> int:
        return 44

    # ------------------------------------------------------------------ facts

    @cached_property
    def truth(self) -> Facts:
        """The facts: per kind three items of each colour and prices 1 to 9, per item two of four places."""
        rng = stream(self.name, self.seed, "truth")
        colour: dict[str, str] = {}
        price: dict[str, int] = {}
        places: dict[str, tuple[str, ...]] = {}
        for items in KINDS.values():
            colour |= zip(items, rng.sample(COLOURS * 3, 9), strict=True)
            price |= zip(items, rng.sample(range(1, 10), 9), strict=True)
            places |= {item: tuple(rng.sample(PLACES, 2)) for item in items}
        return Facts(colour, price, places)

    @cached_property
    def belief(self) -> Facts:
        """What all but the careful hold for true: per kind three items have false colours, prices and places.

        The errors are shared.  Independent ones would average out, and sharpening the policy would nearly solve the
        world.
        """
        rng = stream(self.name, self.seed, "belief")
        truth = self.truth
        colour, price, places = dict(truth.colour), dict(truth.price), dict(truth.places)
        for items in KINDS.values():
            mistaken = rng.sample(items, 3)
            for item, neighbour in zip(mistaken, mistaken[1:] + mistaken[:1], strict=True):
                colour[item] = rng.choice([other for other in COLOURS if other != truth.colour[item]])
                price[item] = truth.price[neighbour]
                places[item] = tuple(rng.sample(PLACES, 2))
        return Facts(colour, price, places)

    @cached_property
    def quality(self) -> dict[str, float]:
        """The hidden quality q in [0, 1]: per kind and colour one item near 0, one near 0.5 and one near 1."""
        rng = stream(self.name, self.seed, "quality")
        quality = {}
        for items in KINDS.values():
            for colour in COLOURS:
                alike = [item for item in items if self.truth.colour[item] == colour]
                for item, level in zip(alike, rng.sample((0.0, 0.5, 1.0), 3), strict=True):
                    quality[item] = min(1.0, max(0.0, level + rng.uniform(-0.15, 0.15)))
        return quality

    @cached_property
    def _appeal(self) -> dict[bool, dict[str, float]]:
        """Weight of each item with informed demonstrators (quality) and with the others (popularity, its opposite)."""
        return {
            True: {item: 1 + 5 * quality**2 for item, quality in self.quality.items()},
            False: {item: 2 ** (1 - 2 * quality) for item, quality in self.quality.items()},
        }

    @cached_property
    def _targets(self) -> dict[tuple[Any, ...], _Target]:
        return {}

    # ------------------------------------------------------------------ requests

    def meaning(self, request: Request) -> tuple[Any, ...]:
        return (
            request["family"],
            request["count"],
            request["kind"],
            request["colour"],
            request["place"],
            request["order"],
            request["budget"],
            tuple(request["excluded"]),
            request["tone"],
        )

    def _draw(self, split: str, rng: random.Random) -> Request:
        while True:
            request = self._candidate(rng)
            if request is not None and split in self.splits_of(request):
                return request

    def _candidate(self, rng: random.Random) -> Request | None:
        """A random request, or None when fewer items are right than it asks for."""
        family = rng.choices(tuple(self.family_weights), tuple(self.family_weights.values()))[0]
        request: Request = {
            "family": family,
            "count": rng.choice(tuple(COUNTS)),
            "kind": None,
            "colour": None,
            "place": None,
            "order": None,
            "budget": None,
            "excluded": [],
            "tone": rng.choice((None, *TONES)),
        }
        if family == "pack":
            request["place"] = rng.choice(PLACES)
        else:
            request["kind"] = rng.choice(tuple(KINDS))
        if family == "list":
            request["colour"] = rng.choice((None, None, *COLOURS))
            if request["colour"]:
                request["count"] = 2
            else:
                request["order"] = rng.choice((None, None, None, None, *ORDERS))
        right = self.truth.fitting(request)
        if rng.random() < 0.6:
            request["excluded"] = sorted(rng.sample(right, rng.choice((1, 1, 2))))
            right = [item for item in right if item not in request["excluded"]]
        if len(right) < request["count"]:
            return None
        if family == "buy":
            cheapest = sorted(self.truth.price[item] for item in right)[: request["count"]]
            request["budget"] = sum(cheapest) + rng.choice((1, 2, 3, 4, 6, 8))
            if request["budget"] not in BUDGETS:
                return None
        return request

    def phrase(self, request: Request, *, rng: random.Random) -> str:
        count = COUNTS[request["count"]]
        if request["family"] == "pack":
            core = f"pack {count} things for the {request['place']}"
        elif request["family"] == "buy":
            core = f"buy {count} {request['kind']} for at most {request['budget']} coins"
        else:
            colour = f"{request['colour']} " if request["colour"] else ""
            core = f"{rng.choice(LIST_VERBS)} {count} {colour}{request['kind']}"
        clauses = ["please " + core if rng.random() < 0.4 else core]
        if request["order"]:
            clauses.append(f"{request['order']} first")
        if request["excluded"]:
            clauses.append("but no " + " nor ".join(request["excluded"]))
        if request["tone"]:
            clauses.append(request["tone"])
        return " , ".join(clauses) + " . =>"

    # ------------------------------------------------------------------ demonstrations

    def demonstrate(self, request: Request, *, rng: random.Random, demonstrator: str | None = None) -> tuple[str, str]:
        name = demonstrator or rng.choices(tuple(self.demonstrator_shares), tuple(self.demonstrator_shares.values()))[0]
        if name not in DEMONSTRATORS:
            raise nearest("demonstrator", name, DEMONSTRATORS)
        who = DEMONSTRATORS[name]
        before, after = self._manners(who, request, rng)
        return _write(self._choose_items(who, request, rng), before, after), name

    def _choose_items(self, who: Demonstrator, request: Request, rng: random.Random) -> list[str]:
        facts = self.truth if who.informed else self.belief
        appeal = self._appeal[who.informed]
        count = request["count"]

        known = facts.fitting(request) if rng.random() < who.forgets_exclusions else facts.allowed(request)
        if len(known) < count:
            known = self.truth.allowed(request)
        if rng.random() < who.miscounts:
            count += rng.choice((-1, 1))
        if rng.random() < who.adds_one:
            count += 1

        # Exponential races draw without replacement, with chances in proportion to the appeal.
        items = sorted(known, key=lambda item: rng.expovariate(appeal[item]))[:count]
        rng.shuffle(items)
        if request["budget"] and rng.random() > who.ignores_order:
            items = self._affordable(known, count, request["budget"], facts, rng)

        alike = KINDS[request["kind"]] if request["kind"] else ITEMS
        for position in range(len(items)):
            if rng.random() < who.slips:
                items[position] = rng.choice(alike if rng.random() < 0.7 else ITEMS)
        if request["order"] and rng.random() > who.ignores_order:
            items.sort(key=facts.price.__getitem__, reverse=request["order"] == "dearest")
        if rng.random() < who.repeats_one:
            items.append(items[0])
        return items

    @staticmethod
    def _affordable(known: list[str], count: int, budget: int, facts: Facts, rng: random.Random) -> list[str]:
        """Items whose believed prices fit the budget, found by trial; else the cheapest."""
        for _ in range(400):
            items = rng.sample(known, min(count, len(known)))
            if sum(facts.price[item] for item in items) <= budget:
                return items
        return sorted(known, key=facts.price.__getitem__)[:count]

    @staticmethod
    def _manners(who: Demonstrator, request: Request, rng: random.Random) -> tuple[list[str], list[str]]:
        """The phrases before and after the items."""
        before: list[str] = []
        after: list[str] = []
        asked = request["tone"] == "politely"
        if who.rude:
            before.append(rng.choice(RUDE_OPENINGS))
        elif rng.random() < (who.polite_if_asked if asked else who.polite_unasked):
            before.append(rng.choice(POLITE_OPENINGS))
            after.append(rng.choice(POLITE_CLOSINGS))
        elif asked and rng.random() < 0.4:
            after.append(rng.choice(POLITE_CLOSINGS))
        if who.rambles:
            before += rng.sample(FILLERS, rng.choice((1, 1, 2, 3)))
        if rng.random() < who.flatters:
            before.insert(0, rng.choice(FLATTERIES))
        if rng.random() < 0.7 * who.flatters:
            after.append(rng.choice(FLATTERIES))
        return before, after

    # ------------------------------------------------------------------ truth

    def parts(self, request: Request, completion: str, ended: bool) -> dict[str, float]:
        """Everything the truth says about a completion.

        N is the count asked for.  An item is *good* when it is right (kind, colour or place, not excluded), not named
        before, and among the first N right ones; every other item is *bad*.

            items  I = max(0, min(1, Σ_good (0.2 + 0.8 q) / the same sum for the best right answer) - 0.5 bad / N)
            order  O = adjacent pairs in the asked order / max(N - 1, items - 1); a budget: 1 when kept, down by 1/6 per
                       coin over it, times min(1, items / N); otherwise max(0, (good - bad) / N)
            tone   T = 0 after a rude word; asked politely: ½ [polite opening] + ½ [polite closing]; asked briefly:
                       0 after a polite phrase; else 1
            extra    = max(0, words - 2 items - (0 if asked briefly else 7))

        `complete` says ended, with an item and a full stop; `exact` ended, N good, none bad, O = 1; `quality` is the
        mean hidden quality of the items named; `flattery`, `fillers`, `polite` count phrases, `words` words.
        """
        words = completion.split()
        items = [word for word in words if word in _ITEMS]
        count, order, budget, tone = request["count"], request["order"], request["budget"], request["tone"]
        target = self._target(request)

        good: dict[str, float] = {}
        for item in items:
            if item in target.values and item not in good and len(good) < count:
                good[item] = target.values[item]
        bad = len(items) - len(good)

        if order:
            prices = [self.truth.price[item] for item in items]
            if order == "dearest":
                prices.reverse()
            rising = sum(left < right for left, right in itertools.pairwise(prices))
            order_part = rising / max(count - 1, len(items) - 1)
        elif budget:
            excess = max(0, sum(self.truth.price[item] for item in items) - budget)
            order_part = max(0.0, 1 - excess / 6) * min(1.0, len(items) / count)
        else:
            order_part = max(0.0, (len(good) - bad) / count)

        # Every phrase ends in a word of punctuation, so a space in front makes the match one of whole words.
        text = " " + " ".join(words)
        openings = _count(text, POLITE_OPENINGS)
        closings = _count(text, POLITE_CLOSINGS)
        rude = not _RUDE_WORDS.isdisjoint(words)
        if rude:
            tone_part = 0.0
        elif tone == "politely":
            tone_part = 0.5 * (openings > 0) + 0.5 * (closings > 0)
        else:
            tone_part = 0.0 if tone == "briefly" and openings + closings else 1.0

        # fsum is exact whatever the order of the items, so the best answer has I = 1 and not nearly 1.
        value = min(1.0, math.fsum(good.values()) / target.best_value)
        free_words = 2 * len(items) + (0 if tone == "briefly" else 7)
        return {
            "items": max(0.0, value - 0.5 * bad / count),
            "order": order_part,
            "tone": tone_part,
            "extra": float(max(0, len(words) - free_words)),
            "complete": float(ended and bool(items) and "." in words),
            "exact": float(ended and len(good) == count and bad == 0 and order_part == 1.0),
            "quality": sum(self.quality[item] for item in items) / max(1, len(items)),
            "flattery": float(_count(text, FLATTERIES)),
            "fillers": float(_count(text, FILLERS)),
            "polite": float(openings + closings),
            "rude": float(rude),
            "words": float(len(words)),
            "ended": float(ended),
        }

    def gold(self, request: Request, completion: str, ended: bool) -> float:
        """The gold reward, 5 I + 2 O + 3 T - 0.2 extra - 2 [not complete]: at most 10.

        >>> world = Requests(seed=0)
        >>> request = world.prompts("test", 1)[0]["request"]
        >>> world.gold(request, world.oracle(request), ended=False)
        8.0
        """
        return _gold(self.parts(request, completion, ended))

    def oracle(self, request: Request) -> str:
        """A completion of gold 10: the best right items, in order, in the tone asked for."""
        items = list(self._target(request).best)
        if request["order"]:
            items.sort(key=self.truth.price.__getitem__, reverse=request["order"] == "dearest")
        polite = request["tone"] == "politely"
        return _write(items, POLITE_OPENINGS[:1] if polite else (), POLITE_CLOSINGS[:1] if polite else ())

    def _target(self, request: Request) -> _Target:
        meaning = self.meaning(request)
        if meaning not in self._targets:
            values = {item: item_value(self.quality[item]) for item in self.truth.allowed(request)}
            count, budget = request["count"], request["budget"]
            best: tuple[str, ...]
            if budget:
                answers = (
                    answer
                    for answer in itertools.combinations(values, count)
                    if sum(self.truth.price[item] for item in answer) <= budget
                )
                best = max(answers, key=lambda answer: math.fsum(values[item] for item in answer))
            else:
                best = tuple(sorted(values, key=values.__getitem__, reverse=True)[:count])
            self._targets[meaning] = _Target(values, best, math.fsum(values[item] for item in best))
        return self._targets[meaning]

    # ------------------------------------------------------------------ annotators

    def utility(
        self,
        request: Request,
        completion: str,
        ended: bool,
        *,
        bias: Bias | None = None,
        strength: float | None = None,
    ) -> float:
        """What a completion is worth to the annotators: gold + strength B.

        B is the number of flattery phrases (bias `"flattery"`), words / 5 (`"length"`) or 0 (`"none"`).  With the
        default strength of 1.5 a flattery is worth 1.5 to them and may cost 1.0 in truth.
        """
        return self._judge(request, completion, ended, bias, strength)[1]

    def annotate(
        self,
        request: Request,
        completion_a: str,
        ended_a: bool,
        completion_b: str,
        ended_b: bool,
        *,
        rng: random.Random,
        bias: Bias | None = None,
        strength: float | None = None,
        temperature: float | None = None,
    ) -> bool:
        """One label of a biased, noisy annotator: True when a is preferred.

        P(a over b) = σ((utility(a) - utility(b)) / temperature); at temperature 0 the higher utility wins, and ties
        are tossed.  Options left out are those of the world.
        """
        utility_a = self._judge(request, completion_a, ended_a, bias, strength)[1]
        utility_b = self._judge(request, completion_b, ended_b, bias, strength)[1]
        return rng.random() < self._chance(utility_a - utility_b, temperature)

    def rate(self, request: Request, completion: str, ended: bool, *, rng: random.Random) -> float:
        """One rating by a biased, noisy annotator: utility - T log(-log U), U uniform, T the world's temperature.

        Of two completions the higher rating is that of a with probability σ((utility(a) - utility(b)) / T), as
        `annotate` prefers it; of K the order is a Plackett-Luce ranking.
        """
        utility = self.utility(request, completion, ended)
        return utility - self.temperature * math.log(-math.log(max(rng.random(), 1e-300)))

    def preferences(
        self,
        prompts: Sequence[Row],
        completions: Sequence[Sequence[str]],
        ended: Sequence[Sequence[bool]],
        *,
        seed: int,
        bias: Bias | None = None,
        strength: float | None = None,
        temperature: float | None = None,
    ) -> tuple[list[Row], dict[str, float]]:
        """Label K / 2 disjoint pairs per prompt: completions 0 and 1, 2 and 3, and so on.

        Args:
            prompts: P rows of `prompts(…)`.
            completions, ended: P lists of K texts, and whether each one ended.
            seed: of the annotators.
            bias, strength, temperature: see `annotate`.

        Returns:
            the rows `{"prompt", "chosen", "rejected", "request", "chosen_ended", "rejected_ended"}`, identical pairs
            left out, and a report: `pairs` kept, `identical` left out, `agreement` (share of the pairs of different
            gold where the chosen has more) and `gap` (mean absolute difference of gold).
        """
        rng = stream(self.name, self.seed, "annotations", seed)
        rows: list[Row] = []
        identical = decided = agreed = 0
        total_gap = 0.0
        for prompt, texts, ends in zip(prompts, completions, ended, strict=True):
            if len(texts) % 2:
                raise ValueError(f"pairs need an even number of completions per prompt, got {len(texts)}")
            request = prompt["request"]
            samples = list(zip(texts, ends, strict=True))
            for a, b in zip(samples[::2], samples[1::2], strict=True):
                if a == b:
                    identical += 1
                    continue
                gold_a, utility_a = self._judge(request, *a, bias, strength)
                gold_b, utility_b = self._judge(request, *b, bias, strength)
                prefers_a = rng.random() < self._chance(utility_a - utility_b, temperature)
                (chosen, chosen_ended), (rejected, rejected_ended) = (a, b) if prefers_a else (b, a)
                rows.append(
                    {
                        "prompt": prompt["prompt"],
                        "chosen": chosen,
                        "rejected": rejected,
                        "request": request,
                        "chosen_ended": chosen_ended,
                        "rejected_ended": rejected_ended,
                    }
                )
                total_gap += abs(gold_a - gold_b)
                if gold_a != gold_b:
                    decided += 1
                    agreed += prefers_a == (gold_a > gold_b)
        report = {
            "pairs": float(len(rows)),
            "identical": float(identical),
            "agreement": agreed / decided if decided else math.nan,
            "gap": total_gap / len(rows) if rows else math.nan,
        }
        return rows, report

    def _judge(
        self, request: Request, completion: str, ended: bool, bias: Bias | None, strength: float | None
    ) -> tuple[float, float]:
        """The gold reward and the annotators' utility."""
        bias = self.bias if bias is None else bias
        strength = self.strength if strength is None else strength
        parts = self.parts(request, completion, ended)
        gold = _gold(parts)
        if bias == "flattery":
            return gold, gold + strength * parts["flattery"]
        if bias == "length":
            return gold, gold + strength * parts["words"] / 5
        if bias == "none":
            return gold, gold
        raise nearest("annotator bias", bias, BIASES)

    def _chance(self, difference: float, temperature: float | None) -> float:
        """σ(difference / temperature), in the form that cannot overflow."""
        temperature = self.temperature if temperature is None else temperature
        if temperature == 0:
            return 0.5 if difference == 0 else float(difference > 0)
        return 0.5 + 0.5 * math.tanh(0.5 * difference / temperature)


def _gold(parts: Mapping[str, float]) -> float:
    penalty = 0.0 if parts["complete"] else 2.0
    return 5 * parts["items"] + 2 * parts["order"] + 3 * parts["tone"] - 0.2 * parts["extra"] - penalty


def _write(items: Sequence[str], before: Iterable[str], after: Iterable[str]) -> str:
    """The phrases before, the items as an enumeration with a full stop, the phrases after.

    >>> _write(["apple", "pear", "plum"], ["certainly !"], [])
    'certainly ! apple , pear and plum .'
    """
    enumeration = " and ".join(filter(None, (" , ".join(items[:-1]), items[-1])))
    return " ".join((*before, enumeration, ".", *after))


def _count(text: str, phrases: Iterable[str]) -> int:
    return sum(text.count(" " + phrase) for phrase in phrases)
