"""What every embedded world shares: named random streams, splits by meaning, rows, the tokenizer, reward functions.

A *world* is a small task in a tiny language whose truth is known exactly, so that an algorithm can be judged by the
gold reward it earns and not by the proxy it was trained on.  One word is one token.  A *request* is the meaning of a
prompt, a plain JSON-able dict; the scorers take it back as a data set column.

Everything random comes from `stream(...)`, a generator seeded by names, so no two purposes ever share numbers.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Request = dict[str, Any]
Row = dict[str, Any]

PAD, BOS, EOS, ARROW = "<pad>", "<bos>", "<eos>", "=>"

# Twentieths of all meanings.  "sft" feeds demonstrations, "train" feeds preferences and reinforcement learning.
SPLIT_SHARES = {"test": 4, "validation": 2, "sft": 7, "train": 7}
SPLITS = tuple(SPLIT_SHARES)
_SPLIT_OF_BUCKET = tuple(itertools.chain.from_iterable([split] * share for split, share in SPLIT_SHARES.items()))

# A split is taken to be exhausted after this many draws in a row without a new meaning.
PATIENCE = 20_000


def stream(*names: object) -> random.Random:
    """A random generator that depends on the names and on nothing else.

    seed = SHA-256(name₁, name₂, …); the names are separated, so ("a", "bc") and ("ab", "c") differ.

    >>> stream("requests", 0, "test").random() == stream("requests", 0, "test").random()
    True
    """
    return random.Random(_digest(*names))


def _digest(*names: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, names)).encode()).digest(), "big")


def nearest(kind: str, name: object, known: Collection[str]) -> ValueError:
    """The error for an unknown name: it lists the known ones and suggests the nearest.

    >>> print(nearest("split", "tset", ["sft", "test"]))
    no split 'tset'; did you mean 'test'? known: sft, test
    """
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return ValueError(f"no {kind} {name!r}; {hint}known: {', '.join(known)}")


def make_vocabulary(texts: Iterable[str]) -> tuple[str, ...]:
    """The special words, then each word of the texts once, in order of first appearance.

    >>> make_vocabulary(["enjoy !", "of course !"])
    ('<pad>', '<bos>', '<eos>', '=>', 'enjoy', '!', 'of', 'course')
    """
    return tuple(dict.fromkeys([PAD, BOS, EOS, ARROW, *(word for text in texts for word in text.split())]))


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A task with known truth; its fields are its whole configuration, so equal fields mean an equal world.

    A world says how to draw, phrase, demonstrate and score a request; everything else follows here.
    """

    name: ClassVar[str]
    vocabulary: ClassVar[tuple[str, ...]]

    seed: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the configuration only: what was derived from it must not change the bytes of an equal world."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        return partial(type(self), **options), ()

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """The longest completion to sample, its end token included."""

    @abstractmethod
    def meaning(self, request: Request) -> tuple[Any, ...]:
        """What is asked, without how it is phrased: two requests with one meaning always fall into one split."""

    @abstractmethod
    def _draw(self, split: str, rng: random.Random) -> Request:
        """One random request of the split."""

    @abstractmethod
    def phrase(self, request: Request, *, rng: random.Random) -> str:
        """The request as a prompt; it ends with the word `=>`."""

    @abstractmethod
    def demonstrate(self, request: Request, *, rng: random.Random, demonstrator: str | None = None) -> tuple[str, str]:
        """A demonstration and the demonstrator who wrote it (drawn by the shares unless named)."""

    @abstractmethod
    def parts(self, request: Request, completion: str, ended: bool) -> dict[str, float]:
        """Everything the truth says about a completion; `exact` is the verifier."""

    @abstractmethod
    def gold(self, request: Request, completion: str, ended: bool) -> float:
        """The true reward, which training never sees unless it asks for it."""

    @abstractmethod
    def oracle(self, request: Request) -> str:
        """A completion with the highest gold reward there is."""

    def exact(self, request: Request, completion: str, ended: bool) -> float:
        """The verifier: 1.0 when the request is met exactly and the completion has ended, else 0.0."""
        return self.parts(request, completion, ended)["exact"]

    def splits_of(self, request: Request) -> tuple[str, ...]:
        """The splits that may hold the request: one, decided by a hash of the world's seed and the meaning."""
        bucket = _digest(self.name, self.seed, *self.meaning(request)) % len(_SPLIT_OF_BUCKET)
        return (_SPLIT_OF_BUCKET[bucket],)

    def prompts(self, split: str, n: int, *, skip: int = 0, unique: bool = False) -> list[Row]:
        """Rows `skip` to `skip + n` of the endless, fixed stream of a split: `{"prompt", "request"}`.

        prompts(s, n, skip=k) = prompts(s, n + k)[k:].  With `unique` no meaning comes twice in the stream.
        """
        return list(itertools.islice(self._stream_prompts(split, unique), skip, skip + n))

    def demonstrations(self, n: int, *, skip: int = 0) -> list[Row]:
        """Demonstrations `skip` to `skip + n`: row i answers row i of `prompts("sft", …)`, and ends."""
        return list(itertools.islice(self._stream_demonstrations(), skip, skip + n))

    def _stream_prompts(self, split: str, unique: bool) -> Iterator[Row]:
        if split not in SPLITS:
            raise nearest("split", split, SPLITS)
        rng = stream(self.name, self.seed, "prompts", split)
        seen: set[tuple[Any, ...]] = set()
        repeats = 0
        while True:
            request = self._draw(split, rng)
            if unique:
                meaning = self.meaning(request)
                repeats = repeats + 1 if meaning in seen else 0
                if repeats > PATIENCE:
                    raise ValueError(
                        f"the split {split!r} of {self!r} has only about {len(seen):,} different meanings "
                        f"({PATIENCE:,} draws in a row brought no new one); ask for fewer or pass unique=False"
                    )
                if repeats:
                    continue
                seen.add(meaning)
            # The space at the end makes prompt + completion words again when they are put together.
            yield {"prompt": self.phrase(request, rng=rng) + " ", "request": request}

    def _stream_demonstrations(self) -> Iterator[Row]:
        rng = stream(self.name, self.seed, "demonstrations")
        for row in self._stream_prompts("sft", unique=False):
            completion, demonstrator = self.demonstrate(row["request"], rng=rng)
            yield {
                "prompt": row["prompt"],
                "completion": completion,
                "request": row["request"],
                "demonstrator": demonstrator,
            }

    @property
    def gold_reward(self) -> RewardFunction:
        """The gold reward as a reward function for training: the one case without a proxy."""
        return RewardFunction(self, "gold")

    @property
    def exact_reward(self) -> RewardFunction:
        """The verifier as a reward function for training."""
        return RewardFunction(self, "exact")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One word, one token, id = position in `vocabulary`; `<bos>` in front of every text, nothing behind it.

        A word outside the vocabulary is an error, never a silent `<unk>`.

        >>> import prefzoo.worlds
        >>> prefzoo.worlds.make("sums").tokenizer()("2 7 + 4 = =>")["input_ids"]
        [1, 6, 11, 14, 8, 16, 3]
        """
        # Imported here: the worlds themselves need nothing but the standard library.
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(self.vocabulary)}))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, self.vocabulary.index(BOS))]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=PAD,
            bos_token=BOS,
            eos_token=EOS,
            clean_up_tokenization_spaces=False,  # the clean-up would glue punctuation to the word before it
        )


@dataclass(frozen=True)
class RewardFunction:
    """A world's score with TRL's reward signature: columns come as keyword lists, one float goes out per row.

    rewardᵢ = score(requestᵢ, completionᵢ, endedᵢ), with endedᵢ = the ids of completion i end with the end token.
    """

    world: World
    score: Literal["gold", "exact"]

    @property
    def __name__(self) -> str:
        return f"{self.world.name}_{self.score}"

    def __call__(
        self,
        *,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        request: Sequence[Request],
        **columns: object,
    ) -> list[float]:
        score = getattr(self.world, self.score)
        eos = self.world.vocabulary.index(EOS)
        return [
            score(meaning, text, len(ids) > 0 and ids[-1] == eos)
            for meaning, text, ids in zip(request, completions, completion_ids, strict=True)
        ]
