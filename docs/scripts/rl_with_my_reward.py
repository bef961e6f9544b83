# %% [markdown]
# # Reinforcement learning with my reward function
#
# You can say in a few lines of Python how good an answer is: it is right, it is valid JSON, a test passes. Then the
# model learns from its own answers, and prompts are all the data you need. This runs as it stands; put your own into
# the next cell.

# %%
import random
import time
from pathlib import Path

import prefzoo
from prefzoo.data.formats import split_by_prompt

MODEL = "tiny"  # yours: a folder or a hub id. "tiny" has a third of a million parameters and is taught below
DATA = "example"  # yours: a file with a column prompt, and whatever else the reward wants to know
LEARNING_RATE = 6e-4  # 1e-6 for a model of a billion parameters
OUT = Path("runs", f"reward-{time.strftime('%m%d-%H%M%S')}")  # a new folder each time: no run is written over

# %% [markdown]
# **The example.** Sums, and a model that was taught by careless people: three of ten answers that it imitated are
# wrong, and half of them ramble.

# %%
if DATA == "example":
    ways = ("What is {} plus {}?", "{} + {} = ?", "Add {} and {}.")
    DATA = [{"prompt": way.format(a, b), "answer": str(a + b)} for way in ways for a in range(10) for b in range(10)]
if MODEL == "tiny":
    rng = random.Random(0)
    taught = []
    for row in 4 * prefzoo.load_dataset(DATA).rows:
        said = int(row["answer"]) + rng.choice((0, 0, 0, 0, 0, 0, 0, -1, 1, 2))
        manner = rng.choice((" {}", " Well, let me see, it is {}"))
        taught.append({"prompt": row["prompt"], "completion": manner.format(said)})
    prefzoo.train("sft", model="tiny", dataset=taught, output_dir=OUT / "start", learning_rate=3e-3, epochs=10)
    MODEL = OUT / "start" / "final"

# %% [markdown]
# **The reward.** It gets lists, one item per completion: `prompts`, `completions`, and the columns of the data that it
# names, here `answer`. It returns numbers, or None where it has nothing to say. The signature is TRL's, and so is
# `log_metric`: numbers of your own beside the reward, which show *why* it rises. Try it by hand before any training.


# %%
def right_and_brief(completions, answer, log_metric, **columns):
    words = [text.split() for text in completions]
    right = [said[-1:] == [number] for said, number in zip(words, answer, strict=True)]
    log_metric("right", sum(right) / len(right))
    log_metric("words", sum(map(len, words)) / len(words))
    return [is_right - 0.03 * len(said) for is_right, said in zip(right, words, strict=True)]


print(right_and_brief([" 7", " Well, it is 8"], ["7", "7"], log_metric=print))

# %% [markdown]
# **Train, step by step.** `prefzoo.train` does all in one call; `prefzoo.steps` gives you the loop, to look, plot or
# stop. A quarter of the prompts is held out: `eval/...` is about fresh answers to prompts that were never trained on.

# %%
train, test = split_by_prompt(prefzoo.load_dataset(DATA), 0.25)
sampling = {"group_size": 8, "prompts_per_step": 16, "max_new_tokens": 16}
training = {"output_dir": OUT / "grpo", "learning_rate": LEARNING_RATE, "max_steps": 100, "quiet": True}
evaluating = {"eval_dataset": test, "eval_steps": 20}
steps = prefzoo.steps("grpo", model=MODEL, dataset=train, reward=right_and_brief, **sampling, **training, **evaluating)
for step in steps:
    if step.evaluation:
        shown = ("eval/reward", "eval/right", "eval/words", "eval/kl")
        print(f"step {step.number:3}", *(f"  {name} {step.evaluation[name]:.2f}" for name in shown))
run = steps.finish()  # writes the model as it is now; leave the loop early with break

# %% [markdown]
# **Did it get better?** The start and the result answer the same held-out prompts; the same reward judges. An answer is
# worth what your reward says and nothing else: read some, and watch the KL, which says how far the model went for it.

# %%
result = prefzoo.compare({"trained": run, "start": MODEL}, prompts=test, judge=right_and_brief, samples=4)
print(result)
for number in range(4):
    before, after = (result.answers[name][4 * number] for name in ("start", "trained"))
    print(f"{test.rows[number]['prompt']:20} {before!r:32} -> {after!r}")
assert result.pairs[0]["win"]["ci"][0] > 0.5, "the reward did not rise"
