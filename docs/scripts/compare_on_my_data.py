# %% [markdown]
# # Compare three algorithms on my data
#
# You have pairs and wonder which algorithm to use. This script trains three from the same start on the same pairs and
# lets them answer the same new prompts, with the same random numbers. It runs as it stands; put your own into the next
# cell, all four.

# %%
import random
import time
from pathlib import Path

import prefzoo
import prefzoo.worlds
from prefzoo.data.formats import split_by_prompt

MODEL = "tiny"  # yours: a folder or a hub id. "tiny" has a third of a million parameters and is taught below
DATA = "example"  # yours: a file with prompt, chosen, rejected
MAX_NEW_TOKENS = 44  # of an answer; for yours perhaps 256
JUDGE = "example"  # yours: a reward function, a verifier ("exact", "numeric"), or the folder of a reward model
ALGORITHMS = {  # by name, each with its options; for a model of a billion parameters 1e-6 and sft 1e-5
    "sft": {"learning_rate": 5e-4},  # imitates the chosen answers: what the others must beat
    "dpo": {"learning_rate": 2e-4, "beta": 0.1},
    "kto": {"learning_rate": 5e-4, "beta": 0.1},
}
OUT = Path("runs", f"compare-{time.strftime('%m%d-%H%M%S')}")  # a new folder each time: no run is written over

# %% [markdown]
# **The example** is a world of `prefzoo bench`: a small language in which people ask for things. The start imitates
# people of mixed skill. For the pairs two of them answer a request, and an annotator, who errs and likes flattery,
# prefers one. What an answer is truly worth is known here: that is the judge, and nobody is trained on it.

# %%
world = prefzoo.worlds.make("requests", seed=0)
if DATA == "example":
    asked, rng = world.prompts("train", 1200, unique=True), random.Random(0)
    answers = [[world.demonstrate(row["request"], rng=rng)[0] for _ in "ab"] for row in asked]
    DATA, labels = world.preferences(asked, answers, [[True, True]] * len(asked), seed=0)
    print("the annotator agrees with the truth in", f"{labels['agreement']:.0%}", "of the pairs")
    JUDGE = world.gold_reward
if MODEL == "tiny":
    taught, words = world.demonstrations(8000), world.tokenizer()
    prefzoo.train(
        "sft", model="tiny", tokenizer=words, dataset=taught, output_dir=OUT / "start", learning_rate=3e-3,
        rows_per_step=64, quiet=True,
    )  # fmt: skip
    MODEL = OUT / "start" / "final"

# %% [markdown]
# **Train.** The same start, the same rows, the same number of passes; the prompts of the test are held out first.

# %%
train, test = split_by_prompt(prefzoo.load_dataset(DATA), 0.2)
models = {}
for name, options in ALGORITHMS.items():
    models[name] = prefzoo.train(name, model=MODEL, dataset=train, output_dir=OUT / name, epochs=2, **options)
    print(f"{name}: {models[name].spent.seconds:.0f} s")

# %% [markdown]
# **Compare.** Every pair of models: how often A's answer is better than B's to the same prompt, with an interval over
# prompts, and a verdict that accounts for the number of pairs tested.

# %%
result = prefzoo.compare(
    {**models, "start": MODEL}, prompts=test, judge=JUDGE, samples=2, max_new_tokens=MAX_NEW_TOKENS
)
print(result)

# %% [markdown]
# **What this says, and what not.** These are verdicts about the four *models* above. One run per method says nothing
# about the *methods*: another seed, or a learning rate that suits one of them better, can turn the order round. To
# compare methods on your pairs, over seeds, with a judge trained on pairs of its own:
# ```bash
# prefzoo bench pairs --data FILE --seeds 5
# ```

# %%
against_start = {pair["a"]: pair["win"] for pair in result.pairs if pair["b"] == "start"}
for name, win in against_start.items():
    print(f"this {name} model wins {win['estimate']:.0%} against the start ({win['ci'][0]:.0%} to {win['ci'][1]:.0%})")
assert max(win["ci"][0] for win in against_start.values()) > 0.5, "no model is better than the start"
