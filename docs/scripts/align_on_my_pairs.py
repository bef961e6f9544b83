# %% [markdown]
# # Align my model on my pairs
#
# You have a language model and a file that says, of two answers to a prompt, which one is better. This script reads the
# file, trains the model on it, and asks on prompts that nobody was trained on whether the answers got better. It runs
# as it stands, on an example; put your own into the next cell.

# %%
import json
import random
import time
from pathlib import Path

import prefzoo
from prefzoo.data.formats import split_by_prompt

MODEL = "tiny"  # yours: a folder or a hub id. "tiny" has a third of a million parameters and is taught below
DATA = "example"  # yours: a file with prompt, chosen, rejected (JSON Lines, Parquet, CSV, ...) or a hub id
LEARNING_RATE = 3e-4  # 1e-6 for a model of a billion parameters, 1e-5 with lora=True
OUT = Path("runs", f"align-{time.strftime('%m%d-%H%M%S')}")  # a new folder each time: no run is written over

# %% [markdown]
# **The example.** A shop whose staff answer politely or curtly; customers like it polite, nine times of ten. Two rows
# of the file are broken, as happens. The tiny model knows nothing yet, so it first imitates both manners.

# %%
if DATA == "example":
    rng, rows, DATA = random.Random(0), [], OUT / "pairs.jsonl"
    for thing in ("tea", "rice", "soap", "milk", "salt", "bread", "honey", "paper", "ink", "wool", "rope", "glue"):
        for question in ("Do you have {}?", "Is there {} left?", "Any {} today?", "I need {}."):
            for hello in ("", "Hello. ", "Excuse me. ", "Sorry, ", "Good morning. ", "Hi! "):
                fact = rng.choice((" Yes, we do", " No, it is sold out", " On the shelf there"))
                chosen, rejected = f"{fact}. Can I help you with anything else?", f"{fact}."
                if rng.random() < 0.1:
                    chosen, rejected = rejected, chosen
                rows.append({"prompt": hello + question.format(thing), "chosen": chosen, "rejected": rejected})
    rows[3]["chosen"] = rows[3]["rejected"]
    rows[5]["rejected"] = ""
    OUT.mkdir(parents=True)
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows))
if MODEL == "tiny":
    pairs = prefzoo.load_dataset(DATA).rows
    taught = [{"prompt": p["prompt"], "completion": p[side]} for p in pairs for side in ("chosen", "rejected")]
    prefzoo.train("sft", model="tiny", dataset=taught, output_dir=OUT / "start", learning_rate=2e-3, epochs=4)
    MODEL = OUT / "start" / "final"

# %% [markdown]
# **Look at the data.** Its type is found by the columns; broken rows are dropped, counted and shown. Columns of other
# names: `load_dataset(DATA, columns={"chosen": "good", "rejected": "bad"})`. A third of the prompts is then put aside
# for the test, and a third for the judge.

# %%
data = prefzoo.load_dataset(DATA)
print(*data.report.lines(), sep="\n")
rest, test = split_by_prompt(data, 1 / 3)
train, for_judge = split_by_prompt(rest, 1 / 2)

# %% [markdown]
# **Train.** `eval_split` holds out some of the training prompts and watches them; the model that is best by
# `best_metric` is kept in `dpo/best`, the last one in `dpo/final`. Others that learn from pairs are called by name:
# `"ipo"`, `"kto"`.

# %%
watching = {"eval_split": 0.15, "best_metric": "eval/loss"}
options = {"learning_rate": LEARNING_RATE, "epochs": 4, "rows_per_step": 16}
run = prefzoo.train("dpo", model=MODEL, dataset=train, output_dir=OUT / "dpo", **options, **watching)
best = OUT / "dpo" / "best"
print("the best model:", run.best)

# %% [markdown]
# **Read some answers**, three to a prompt of the test: above those of the start, below those of the trained model.

# %%
asked = [row["prompt"] for row in test.rows[:3]]
before, after = (prefzoo.generate(model, asked, n=3, max_new_tokens=32) for model in (MODEL, best))
for answers in zip(asked, before, after, strict=True):
    print(*answers, sep="\n    ")

# %% [markdown]
# **Did it get better?** A falling loss says that it learned the labels. Whether its answers are better must somebody
# else say: a reward model, trained on pairs that this model has not seen. It is no human, but it knows nothing of the
# training.

# %%
prefzoo.train("reward_model", model=MODEL, dataset=for_judge, output_dir=OUT / "judge", **options)
judge = OUT / "judge" / "final"
result = prefzoo.compare({"trained": best, "start": MODEL}, prompts=test, judge=judge, samples=4, max_new_tokens=32)
print(result)
assert result.pairs[0]["win"]["ci"][0] > 0.5, "the trained model does not win against its start"
