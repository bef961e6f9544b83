"""The verifiable world: sums, sorts and small stories with one right answer, shown in two styles.

    2 7 + 1 4 = =>
    direct    answer 4 1
    worked    7 4 : 1 1 ; 2 1 : 0 4 ; answer 4 1

The direct style is short and careless; the worked style is long and nearly always right.  Long sums are out of reach
for a small model that answers directly, so learning from the verifier has a style to shift, carelessness to sharpen
away and arithmetic to learn.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from .base import PATIENCE, Request, World, make_vocabulary, nearest

PEOPLE = ("tom", "ann")
THINGS = ("apples", "coins", "books")
STYLES = ("direct", "worked")


class Level(NamedTuple):
    """One kind of task: `size` is the digits of each number, or for `sort` and `chain` how many one-digit numbers."""

    family: str
    size: int

    def longest_completion(self) -> int:
        """Tokens of the longest worked answer, its end token included."""
        if self.family == "sort":
            work = sum(3 + rest for rest in range(self.size))
            return work + len(("answer", "<eos>")) + self.size
        if self.family == "chain":
            return 3 * (self.size - 1) + len(("answer", "<eos>")) + 2
        return 6 * self.size + len(("answer", "<eos>")) + self.size + 1


LEVELS = {
    f"{family}{size}": Level(family, size)
    for family, sizes in {
        "add": (1, 2, 3, 4),
        "subtract": (1, 2, 3, 4),
        "sort": (3, 4, 5, 6, 7),
        "chain": (3, 4, 5, 6),
        "story": (1, 2),
    }.items()
    for size in sizes
}
DEFAULT_LEVELS = ("add1", "add2", "add3", "sort3", "sort4", "sort5", "chain3", "chain4", "story1")

# The 55 sums (and differences) of two digits are the table that longer ones are made of.  There is nothing to
# generalise from, so both training splits hold all of it and no held-out split asks it.
TABLE_LEVELS = ("add1", "subtract1")
TRAINING_SPLITS = ("sft", "train")


@dataclass(frozen=True, kw_only=True)
class Sums(World):
    """The verifiable world; see the module for the language.

    Args:
        seed: draws the splits and all streams.
        levels: any of `LEVELS`, drawn uniformly; held-out splits leave out the tables of one-digit sums.
        worked_share: demonstrations in the worked style; the others are direct.
        careless: chance that a direct answer is spoilt (one digit off, or two sorted neighbours swapped).
        slip: chance of an error in each step of the work; it propagates.

    >>> Sums().oracle({"level": "add2", "numbers": [27, 14], "person": None, "thing": None})
    'answer 4 1'
    """

    name: ClassVar[str] = "sums"
    vocabulary: ClassVar[tuple[str, ...]] = make_vocabulary(
        ("0 1 2 3 4 5 6 7 8 9 + - = , ; : sort has gets more how many now answer", *PEOPLE, *THINGS)
    )

    levels: Sequence[str] = DEFAULT_LEVELS
    worked_share: float = 0.35
    careless: float = 0.30
    slip: float = 0.02

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError(f"no levels; known: {', '.join(LEVELS)}")
        for level in self.levels:
            if level not in LEVELS:
                raise nearest("level", level, LEVELS)

    @property
    def max_new_tokens(self) -> int:
        """40, or more where a level of `levels` has longer worked answers."""
        return max(40, *(LEVELS[level].longest_completion() for level in self.levels))

    # ------------------------------------------------------------------ requests

    def meaning(self, request: Request) -> tuple[Any, ...]:
        numbers = request["numbers"]
        if LEVELS[request["level"]].family in ("add", "sort", "chain"):
            numbers = sorted(numbers)
        return (request["level"], *numbers)

    def splits_of(self, request: Request) -> tuple[str, ...]:
        """One split by the hash of the meaning; the tables of one-digit sums belong to both training splits."""
        return TRAINING_SPLITS if request["level"] in TABLE_LEVELS else super().splits_of(request)

    def _draw(self, split: str, rng: random.Random) -> Request:
        levels = [level for level in self.levels if split in TRAINING_SPLITS or level not in TABLE_LEVELS]
        if not levels:
            raise ValueError(f"the split {split!r} holds no tables of one-digit sums; add a level to {self.levels}")
        level = rng.choice(levels)
        # The level stays while the numbers are redrawn: levels are uniform in every split.
        for _ in range(PATIENCE):
            request = self._candidate(level, rng)
            if split in self.splits_of(request):
                return request
        raise ValueError(f"the level {level!r} has nothing in the split {split!r} of world seed {self.seed}")

    @staticmethod
    def _candidate(level: str, rng: random.Random) -> Request:
        family, size = LEVELS[level]
        request: Request = {"level": level, "numbers": [], "person": None, "thing": None}
        if family == "story":
            low, high = ((2, 10), (10, 60))[size - 1]
            request["numbers"] = [rng.randrange(low, high), rng.randrange(low, high)]
            request["person"], request["thing"] = rng.choice(PEOPLE), rng.choice(THINGS)
        elif family in ("add", "subtract"):
            low = 10 ** (size - 1) if size > 1 else 0
            request["numbers"] = [rng.randrange(low, 10**size), rng.randrange(low, 10**size)]
            if family == "subtract":
                request["numbers"].sort(reverse=True)
        else:
            request["numbers"] = [rng.randrange(10) for _ in range(size)]
        return request

    def phrase(self, request: Request, *, rng: random.Random) -> str:
        numbers = [_digits(number) for number in request["numbers"]]
        family = LEVELS[request["level"]].family
        if family == "story":
            held, gained = numbers
            return f"{request['person']} has {held} {request['thing']} , gets {gained} more , how many now =>"
        if family == "sort":
            return "sort " + " , ".join(numbers) + " =>"
        return (" - " if family == "subtract" else " + ").join(numbers) + " = =>"

    # ------------------------------------------------------------------ demonstrations

    def demonstrate(self, request: Request, *, rng: random.Random, demonstrator: str | None = None) -> tuple[str, str]:
        style = demonstrator or ("worked" if rng.random() < self.worked_share else "direct")
        if style == "worked":
            return self._work(request, rng), style
        if style == "direct":
            return self._blurt(request, rng), style
        raise nearest("demonstrator", style, STYLES)

    def _blurt(self, request: Request, rng: random.Random) -> str:
        """The bare answer, sometimes spoilt."""
        answer = self.answer(request).split()
        if rng.random() < self.careless:
            position = rng.randrange(len(answer))
            if LEVELS[request["level"]].family == "sort":
                other = (position + 1) % len(answer)
                answer[position], answer[other] = answer[other], answer[position]
            else:
                answer[position] = str((int(answer[position]) + rng.choice((-1, 1, 2))) % 10)
        return " ".join(("answer", *answer))

    def _work(self, request: Request, rng: random.Random) -> str:
        """Step by step, believing its own slips.

        sort      smallest number : what remains ;
        chain     running total ;
        otherwise from the units, digit digit : carry digit ;
        """
        family, numbers = LEVELS[request["level"]].family, request["numbers"]
        if family == "sort":
            steps, answer = _work_sort(numbers, self.slip, rng)
        elif family == "chain":
            steps, answer = _work_chain(numbers, self.slip, rng)
        else:
            sign = -1 if family == "subtract" else 1
            steps, answer = _work_columns(numbers[0], numbers[1], sign, self.slip, rng)
        return " ".join((*(f"{step} ;" for step in steps), "answer", answer))

    # ------------------------------------------------------------------ truth

    def answer(self, request: Request) -> str:
        """The right answer, digit by digit.

        >>> Sums().answer({"level": "sort3", "numbers": [5, 2, 8], "person": None, "thing": None})
        '2 5 8'
        """
        family, numbers = LEVELS[request["level"]].family, request["numbers"]
        if family == "sort":
            return " ".join(map(str, sorted(numbers)))
        return _digits(numbers[0] - numbers[1] if family == "subtract" else sum(numbers))

    def parts(self, request: Request, completion: str, ended: bool) -> dict[str, float]:
        """Everything the truth says about a completion.

        exact = [ended, exactly one `answer`, and the words after it are the right digits]; `answered` says that there
        is exactly one `answer`, `worked` that words stand before it, `words` how many words there are.
        """
        words = completion.split()
        answered = words.count("answer") == 1
        position = words.index("answer") if answered else 0
        right = answered and words[position + 1 :] == self.answer(request).split()
        return {
            "exact": float(ended and right),
            "answered": float(answered),
            "worked": float(position > 0),
            "words": float(len(words)),
            "ended": float(ended),
        }

    def gold(self, request: Request, completion: str, ended: bool) -> float:
        """1.0 for a right answer that has ended, else 0.0: the verifier is the whole truth here."""
        return self.exact(request, completion, ended)

    def oracle(self, request: Request) -> str:
        return "answer " + self.answer(request)


def _digits(number: int) -> str:
    return " ".join(str(number))


def _work_sort(numbers: Sequence[int], slip: float, rng: random.Random) -> tuple[list[str], str]:
    """Selection sort; a slip takes any remaining number for the smallest.

    >>> _work_sort([5, 2, 8], 0.0, random.Random(0))
    (['2 : 5 8', '5 : 8', '8 :'], '2 5 8')
    """
    remaining, taken, steps = list(numbers), [], []
    while remaining:
        number = rng.choice(remaining) if rng.random() < slip else min(remaining)
        remaining.remove(number)
        taken.append(number)
        steps.append(" ".join((str(number), ":", *map(str, remaining))))
    return steps, " ".join(map(str, taken))


def _work_chain(numbers: Sequence[int], slip: float, rng: random.Random) -> tuple[list[str], str]:
    """Running totals; a slip is off by -1, 1 or 10.

    >>> _work_chain([7, 8, 9], 0.0, random.Random(0))
    (['1 5', '2 4'], '2 4')
    """
    total, steps = numbers[0], []
    for number in numbers[1:]:
        total += number
        if rng.random() < slip:
            total = max(0, total + rng.choice((-1, 1, 10)))
        steps.append(_digits(total))
    return steps, _digits(total)


def _work_columns(first: int, second: int, sign: int, slip: float, rng: random.Random) -> tuple[list[str], str]:
    """Columns from the units with carry (sign 1) or borrow (sign -1); a slip is off by one in one column.

    >>> _work_columns(27, 14, 1, 0.0, random.Random(0))
    (['7 4 : 1 1', '2 1 : 0 4'], '4 1')
    """
    width = len(str(max(first, second)))
    carry, result, steps = 0, [], []
    for upper, lower in zip(reversed(f"{first:0{width}}"), reversed(f"{second:0{width}}"), strict=True):
        column = int(upper) + sign * (int(lower) + carry)
        if rng.random() < slip:
            column += rng.choice((-1, 1))
        carry = int(column > 9 if sign > 0 else column < 0)
        result.append(str(column % 10))
        steps.append(f"{upper} {lower} : {carry} {column % 10}")
    if carry and sign > 0:
        result.append("1")
    return steps, _digits(int("".join(reversed(result))))
