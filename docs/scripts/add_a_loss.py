# %% [markdown]
# # Add a loss
#
# You have an idea for a loss, and want to know whether it is right and what it does, beside one that is known. A loss
# in prefzoo is one function; registered, it is an algorithm of its name. This runs as it stands; put your own into the
# next cell.

# %%
import random
import time
from pathlib import Path

import torch.nn.functional as F

import prefzoo
from prefzoo.data.formats import split_by_prompt
from prefzoo.losses import register_loss
from prefzoo.records import LossOut, Pairs
from prefzoo.testing import check_loss

MODEL = "tiny"  # yours: a folder or a hub id. "tiny" has a third of a million parameters and is taught below
DATA = "example"  # yours: a file with prompt, chosen, rejected
LEARNING_RATE = 3e-4  # 1e-6 for a model of a billion parameters
OUT = Path("runs", f"loss-{time.strftime('%m%d-%H%M%S')}")  # a new folder each time: no run is written over

# %% [markdown]
# **The example.** Answers may be friendly, and they may be padded. People want them friendly, and fall for padding,
# too: a pair's better answer is the one with more of both, give or take a coin. The start imitates all kinds alike.

# %%
PADDING = " As you may know, that is how it has always been with us."
if DATA == "example":
    rng, DATA = random.Random(0), []
    things = ("tea", "rice", "soap", "milk", "salt", "bread", "honey", "paper", "ink", "wool", "rope", "glue", "corn")
    ways = ("Where is the {}?", "I need {}.", "Any {} left?", "Have you {}?")
    greetings = ("", "Hello. ", "Sorry, ", "Excuse me. ", "Good morning. ", "One question. ", "Hi! ", "Please, ")
    for prompt in [hello + way.format(thing) for hello in greetings for way in ways for thing in things]:
        sides = [(rng.random() < 0.5, rng.random() < 0.5) for _ in "ab"]
        sides.sort(key=lambda side: 2 * side[0] + 1.5 * side[1] + rng.gauss(0, 0.7), reverse=True)
        texts = [" With pleasure:" * kind + " on the shelf there." + PADDING * padded for kind, padded in sides]
        DATA.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
data = prefzoo.load_dataset(DATA)
train, test = split_by_prompt(data, 0.25)
if MODEL == "tiny":
    taught = [
        {"prompt": row["prompt"], "completion": row[side]} for row in data.rows for side in ("chosen", "rejected")
    ]
    prefzoo.train("sft", model="tiny", dataset=taught, output_dir=OUT / "start", learning_rate=2e-3, epochs=5)
    MODEL = OUT / "start" / "final"

# %% [markdown]
# **The loss.** The idea: where the chosen answer is longer, its length explains a part of the preference, so that the
# model need not. The type of the first argument says what a row is, what follows `*` are the options with their
# defaults, the docstring is the page that `prefzoo show` prints. `batch` holds log-probabilities, summed over tokens:
# `_B` is one per row. It returns one value per row; the averaging, the reference model and the batching are not its
# business.


# %%
@register_loss
def length_explained(batch: Pairs, *, beta: float = 0.1, alpha: float = 0.15) -> LossOut:
    """DPO in which the lengths of the answers explain a part of the preference.

        loss = - log sigmoid(beta (log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)) + alpha (|y_w| - |y_l|))

    Args:
        beta: strength of the pull to the reference.
        alpha: what a token more adds to the log-odds of being preferred.

    Source: Park et al., arXiv:2403.19159, equation 9.
    """
    margin_B = beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)
    length_B = alpha * (batch.chosen_len_B - batch.rejected_len_B).to(margin_B.dtype)
    metrics = {"rewards/margins": margin_B.detach(), "rewards/accuracies": (margin_B > 0).float()}
    return LossOut(-F.logsigmoid(margin_B + length_B), metrics)


# %% [markdown]
# **Is it right?** `check_loss` runs the contract of losses on it, before any training: rows do not know each other,
# masked tokens have no effect, no gradient goes into the reference, it stays finite at extremes, every option does
# something ...

# %%
for name, outcome in check_loss(length_explained).items():  # raises, with cause and cure, where a check fails
    print(f"{name:26} {outcome}")

# %% [markdown]
# **What does it do?** Train it beside `dpo`, everything else the same, and let both and the start answer new prompts.


# %%
def friendly(completions, **columns):
    return [float("pleasure" in text) for text in completions]


options = {"learning_rate": LEARNING_RATE, "epochs": 4, "rows_per_step": 16}
models = {
    "length_explained": prefzoo.train(
        "length_explained", model=MODEL, dataset=train, output_dir=OUT / "mine", **options
    ),
    "dpo": prefzoo.train("dpo", model=MODEL, dataset=train, output_dir=OUT / "dpo", **options),
    "start": MODEL,
}
result = prefzoo.compare(models, prompts=test, judge=friendly, samples=4, max_new_tokens=48)
print(result)
words = {name: sum(len(text.split()) for text in texts) / len(texts) for name, texts in result.answers.items()}
for name, texts in result.answers.items():
    print(f"{name:17} friendly {sum(friendly(texts)) / len(texts):4.0%}   {words[name]:4.1f} words")
wins = {(pair["a"], pair["b"]): pair["win"] for pair in result.pairs}
assert wins["length_explained", "start"]["ci"][0] > 0.5, "the new loss did not make it friendlier"
assert words["length_explained"] < words["dpo"], "the new loss did not make it shorter"
