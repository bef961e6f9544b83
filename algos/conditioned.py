"""Conditioned likelihood: everything is imitated, told how good it is; or only what is rated highest."""

from typing import Annotated, Any

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.condition import Condition
from prefzoo.parts.options import ROUNDS, in_rounds
from prefzoo.parts.product import Prefix
from prefzoo.parts.replay import Replay
from prefzoo.parts.source import DatasetRows
from prefzoo.parts.winners import Choose, Filtered, Quantiles
from prefzoo.registry import ABOVE_0, NotNegative, Share, UsageError

LEVELS = ("<|worst|>", "<|bad|>", "<|fair|>", "<|good|>", "<|best|>")


@register_algorithm(paper="arXiv:2302.08582", recommended={"learning_rate": 1e-5})
def csft(*, words: tuple[str, ...] = ("<|bad|>", "<|good|>")) -> Algorithm:
    """Conditional supervised fine-tuning: good and bad answers are learned alike, behind words that tell them apart.

        loss = - mean over tokens of log pi(y | c, x),   c = words[-1] where y is desirable, words[0] where it is not
        answers are sampled from pi(. | words[-1], x)

    Args:
        words: the control words, best last. Two: of labelled answers, or the sides of preference pairs. More: of scored
            answers, a word for each quantile of the scores.

    KL: none, no reference.

    Convention: the words stand before the prompt, behind its BOS token, and are ordinary text: give them as
    ``added_tokens=`` to make each one token. They carry no loss. The paper trains from nothing and leaves the word out
    of one document in a hundred, so that unconditioned text stays in reach; this does not. ``final/decode.json`` puts
    the best word before every prompt of ``prefzoo generate``; another library must be given it.

    Source: Korbak et al., Pretraining Language Models with Human Preferences, arXiv:2302.08582, section 2; on labelled
    answers: Ethayarajh et al., arXiv:2402.01306, as a baseline.

    Example::

        prefzoo.train("csft", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/csft")
    """
    words = tuple(words)
    rows = DatasetRows("unpaired" if len(words) == 2 else "scored")
    return Algorithm(source=rows, condition=Condition(words), loss=create_loss("sft"), product=Prefix(words[-1]))


@register_algorithm(
    paper="arXiv:2205.13636", recommended={"learning_rate": 1e-5, "max_steps": 10},
    shared={**ROUNDS, "samples_per_prompt": 2, "epochs_per_round": 1},
)  # fmt: skip
def quark(
    *,
    words: tuple[str, ...] = LEVELS,
    kl: NotNegative = 0.05,
    capacity: Annotated[int, ABOVE_0] = 65_536,
    **rounds: Any,
) -> Algorithm:
    """Quantised reward konditioning: all samples of the run are imitated behind the quantile of their reward.

        D <- D + { y ~ pi(. | word_K, x) };   k(y) = the quantile of R(x, y) in D
        loss = mean over tokens of D of - log pi(y_t | word_k, x) + kl KL(ref(. | x) || pi(. | word_k, x))

    Args:
        words: one for each of K quantiles, the best last.
        kl: weight of the KL, per nat.
        capacity: samples that are kept, the oldest go first.

    KL: k3 at the tokens of the samples, in the loss, to the start without the word; its gradient is that of the paper's
    KL(ref || pi) for tokens of the policy itself, which older samples are not.

    Convention: each round samples once and passes ``epochs_per_round`` times over all that is kept; the paper draws
    batches evenly from the quantiles. Rewards that are equal share the best of their quantiles. The first round samples
    without a word. The words are ordinary text (``added_tokens=`` makes each one token). ``final/decode.json`` puts the
    best one before every prompt of ``prefzoo generate``; another library must be given it.

    Source: Lu et al., Quark, arXiv:2205.13636, algorithm 1; K = 5 and kl = 0.05: its toxicity task, which has a bonus
    for entropy besides.

    Example::

        prefzoo.train("quark", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    words = tuple(words)
    terms = [Term(create_loss("sft"))]
    if kl:
        terms.append(Term(create_loss("kl_penalty", estimator="k3"), count="token", weight=kl))
    return Algorithm(
        **in_rounds(rounds), replay=Replay(capacity), credit=Quantiles(len(words), advantages=kl > 0),
        terms=tuple(terms), condition=Condition(words, plain_steps=1), product=Prefix(words[-1]),
    )  # fmt: skip


@register_algorithm(recommended={"learning_rate": 1e-5, "max_steps": 1}, shared=ROUNDS)
def feedme(*, share: Share = 0.1, ptx: NotNegative = 0.0, winners: Choose = "best", **rounds: Any) -> Algorithm:
    """FeedME: the likelihood of the policy's own highest-rated samples, of all prompts together, and of demonstrations.

        loss = - mean over tokens of log pi(y), y in the ``share`` of the samples of highest R
               + ptx (- mean over tokens of log pi(demonstrations))

    Args:
        share: of the samples; those with equal ratings come together.
        ptx: weight of the demonstrations (``ptx_dataset=``).
        winners: ``"random"``: as many of each prompt, whatever their reward.

    KL: not penalised.

    Convention: the ratings are the run's reward; OpenAI took the samples that people rated 7 of 7. A prompt may give
    many samples or none, unlike in ``rejection_sampling``.

    Source: OpenAI, Model index for researchers (2022), "FeedME".

    Example::

        prefzoo.train("feedme", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=1)
    """
    if not 0 < share <= 1:
        raise UsageError(f"feedme: share is that of the samples that are imitated, above 0, got {share:g}.")
    terms = [Term(create_loss("sft"))]
    if ptx:
        terms.append(Term(create_loss("sft"), rows="ptx", weight=ptx))
    credit = Filtered((1 - share,), epochs=rounds["epochs_per_round"], choose=winners)
    return Algorithm(**in_rounds(rounds), credit=credit, terms=tuple(terms))
