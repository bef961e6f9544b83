"""Offline reinforcement learning: from answers that came with scores, without sampling."""

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.advantage_decoding import AdvantageDecoding
from prefzoo.parts.offline import Baseline, ReturnAbove
from prefzoo.parts.prelude import RotatedBaseline
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import NotNegative, Positive, Share


@register_algorithm(paper="arXiv:2206.11871", recommended={"learning_rate": 1e-4})
def ilql(
    *,
    expectile: Share = 0.7,
    gamma: Share = 0.99,
    cql: NotNegative = 0.1,
    likelihood: NotNegative = 1.0,
    polyak: Share = 0.005,
    beta: NotNegative = 1.0,
) -> Algorithm:
    """Implicit language Q-learning: Q and V of every token, learned from scored answers; they steer the decoding.

        Q losses: Σ_k (r_t + γ V_{t+1} - Q_k)² + cql Σ_k (log Σ_v exp Q_k(v) - Q_k);   r is the score, at the last token
        V loss:   |τ - [u < 0]| u²,  u = min(slow Q_1, slow Q_2) - V;   policy: likelihood (- log π(answers))
        decoding: p(v) ∝ π(v) exp(β (min(slow Q_1, slow Q_2)(v) - V))

    Args:
        expectile: τ, from the mean of the data's tokens (0.5) towards their best (1).
        gamma: γ, discount per token.
        cql: weight of the conservative term, which keeps Q low where there are no data.
        likelihood: weight of the policy's own likelihood of the answers: π is to be what the data do. 0: the policy
            stays as it is.
        polyak: by how much the slow Q follow with every step.
        beta: β of the decoding, per unit of the score; 0: the policy alone. Not used in training; edit decode.json.

    The heads have a trunk of their own, a copy of the policy's. The result has three parts: the policy (a folder that
    transformers loads), ``heads/`` (our own format) and ``decode.json``, which says how they make an answer. A plain
    loader sees the policy alone, without the heads, which is imitation of the data: use ``prefzoo.generate``.

    Convention: V and both Q start at 0, so scores are best near it (subtract their mean). β is added to logits before
    the temperature. Losses are means over the tokens of the batch. Defaults of the expectile, cql and polyak as in the
    authors' code; the score is on the last token, as no step has one of its own.

    Source: Snell et al., Offline RL for Natural Language Generation with Implicit Language Q Learning,
    arXiv:2206.11871.

    Example::

        prefzoo.train("ilql", model="my-model", dataset="scored.jsonl", output_dir="runs/ilql")
        prefzoo.generate("runs/ilql", ["a prompt"])
    """
    terms = [
        Term(create_loss("ilql_q", gamma=gamma), count="token", trains="heads"),
        Term(create_loss("ilql_v", expectile=expectile), count="token", trains="heads"),
    ]
    if cql:
        terms.append(Term(create_loss("ilql_cql"), count="token", weight=cql, trains="heads"))
    if likelihood:
        terms.append(Term(create_loss("sft"), count="token", weight=likelihood))
    return Algorithm(
        source=DatasetRows("scored"), terms=tuple(terms), polyak=polyak, product=AdvantageDecoding(beta)
    )  # fmt: skip


@register_algorithm(paper="arXiv:1910.00177", recommended={"learning_rate": 1e-5})
def awr(
    *, beta: Positive = 1.0, cap: Positive = 20.0, baseline: Baseline = "prompt", standardise: bool = True
) -> Algorithm:
    """Advantage-weighted regression: the likelihood of scored answers, weighted by the exponential of their advantage.

        loss = - mean_t min(exp(A_t / β), cap) log π(y_t),   A = score - V

    Args:
        beta: β, in units of A. Small: only the best answers count; large: ``sft``.
        cap: largest weight.
        baseline: V: the mean score of the prompt's answers in all the data (``prompt``), of all answers (``data``), or
            a critic that learns the score from every token on (``critic``).
        standardise: divide A by its standard deviation, so that one β fits all scales.

    KL enters through the weights: they are those of the best policy within a KL of the data's, at the multiplier β.

    Convention: the data stand for the replay buffer, and there is one pass of regression over them: the paper goes on
    sampling. V is fitted to the score itself, not to TD(λ). Prompts with one answer have A = 0 for ``prompt``, and so a
    weight of 1. The cap is the authors'; β = 1 is for standardised advantages.

    Source: Peng et al., Advantage-Weighted Regression, arXiv:1910.00177.

    Example::

        prefzoo.train("awr", model="my-model", dataset="scored.jsonl", baseline="data")
    """
    terms = [Term(create_loss("awr", beta=beta, cap=cap), count="token")]
    if baseline == "critic":
        terms.append(Term(create_loss("clipped_value", clip=None), count="token", trains="critic"))
    return Algorithm(
        source=DatasetRows("scored"), credit=ReturnAbove(baseline, standardise=standardise), terms=tuple(terms)
    )


@register_algorithm(paper="arXiv:2405.17956", recommended={"learning_rate": 1e-6, "rows_per_step": 64})
def hpo(
    *,
    beta: Positive = 0.1,
    weight: NotNegative = 0.01,
    temperature: Positive = 1.0,
    cap: Positive = 20.0,
    baseline: Baseline = "prompt",
    standardise: bool = True,
) -> Algorithm:
    """Hybrid preference optimization: people's labels by KTO, and the designer's own rewards by weighted likelihood.

        loss = mean of KTO's + weight · mean (- min(exp(A / temperature), cap) log π(y)),   A = score - V

    Args:
        beta: of KTO: strength of the pull to the reference, per nat.
        weight: of the auxiliary part. It is a sum over an answer's tokens, so 1 would leave KTO's, which is below 1, no
            say; 0.01 is ours.
        temperature: of the weights exp(A / temperature), in units of A.
        cap: largest weight.
        baseline, standardise: of A, as in ``awr``: V is what the auxiliary score was to be expected to be.

    Trains on unpaired data whose rows have a ``score`` beside their label: the sum of the auxiliary rewards (length,
    safety, style, ...), each with its weight.

    KL enters by KTO's log-ratio to the reference; its reference point is estimated as in ``kto``.

    Convention: the scores are in the data, as no model has to see the answers again. V is a mean over them or a critic
    beside the policy; the paper has a value head on the policy itself. KTO's two classes weigh alike.

    Source: Badrinath et al. (Hybrid, later Unified Preference Optimization), arXiv:2405.17956.

    Example::

        prefzoo.train("hpo", model="my-model", dataset="thumbs_with_scores.jsonl")
    """
    terms = [Term(create_loss("kto", beta=beta))]
    terms.append(Term(create_loss("hpo", beta=temperature, cap=cap), weight=weight))
    if baseline == "critic":
        terms.append(Term(create_loss("clipped_value", clip=None), count="token", trains="critic"))
    return Algorithm(
        source=DatasetRows("unpaired"), credit=ReturnAbove(baseline, standardise=standardise), terms=tuple(terms),
        prelude=RotatedBaseline(),
    )  # fmt: skip
