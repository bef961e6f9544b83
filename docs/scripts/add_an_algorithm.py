# %% [markdown]
# # Add an algorithm
#
# You have an idea not for a loss but for how the pieces go together: where samples come from, what they are worth, what
# the model is trained on. In prefzoo that is a composition of parts. This runs as it stands; put your own into the next
# cell.

# %%
import time
from pathlib import Path

import prefzoo
from prefzoo.algorithm import Algorithm, Schedule, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import LeaveOneOut
from prefzoo.parts.feedback import Reward
from prefzoo.parts.source import Rollouts

MODEL = "tiny"  # yours: a folder or a hub id. "tiny" has a third of a million parameters and is taught below
DATA = "example"  # yours: a file with prompt, completion, and what your reward wants to know, here the answer
LEARNING_RATE = 1e-3  # 1e-6 for a model of a billion parameters
OUT = Path("runs", f"algorithm-{time.strftime('%m%d-%H%M%S')}")  # a new folder each time: no run is written over

# %% [markdown]
# **The example.** Sums, answered in one of three manners. Somebody wants it polite and rewards the word "Gladly", each
# time it is said. You see what will happen.

# %%
if DATA == "example":
    manners = (" It is {}.", " Gladly, it is {}.", " Gladly: {}.")
    sums = [(a, b, manner) for a in range(10) for b in range(10) for manner in manners]
    DATA = [{"prompt": f"{a} + {b}?", "completion": m.format(a + b), "answer": str(a + b)} for a, b, m in sums]
if MODEL == "tiny":
    prefzoo.train("sft", model="tiny", dataset=DATA, output_dir=OUT / "start", learning_rate=2e-3, epochs=15)
    MODEL = OUT / "start" / "final"


def polite(completions, **columns):
    return [text.count("Gladly") for text in completions]


# %% [markdown]
# **The algorithm.** What holds a policy near its start is commonly a KL to a reference model. The idea here: do without
# the reference, and rehearse demonstrations beside the policy gradient. The name of the function is the name of the
# algorithm, its signature the configuration, its docstring the page that `prefzoo show` prints. The body names parts:
# no loop, no models, no averaging. What it needs (a reward, no reference, no critic) follows from them.


# %%
@register_algorithm(recommended={"learning_rate": 1e-6})
def rehearsal(
    *, group_size: int = 8, weight: float = 0.5, prompts_per_step: int = 32, max_new_tokens: int = 256
) -> Algorithm:
    """Policy gradient against the other samples of a prompt, while demonstrations are rehearsed.

        loss = mean over tokens of [ - rho (R_i - mean of R_j over j != i) ] - weight * mean log pi(demonstrations)

    Args:
        group_size: completions sampled per prompt, at least 2.
        weight: of the rehearsal, on rows of ``ptx_dataset``; 0: none.
        prompts_per_step, max_new_tokens: sampling.

    Source: the baseline is RLOO's (arXiv:2402.14740), the rehearsal PPO-ptx's (arXiv:2203.02155).
    """
    surrogate = Term(create_loss("clipped_surrogate"), count="token")
    rehearse = Term(create_loss("sft"), rows="ptx", weight=weight)
    return Algorithm(
        source=Rollouts(group_size, max_new_tokens=max_new_tokens),
        feedback=Reward(),
        credit=LeaveOneOut(),
        terms=(surrogate, rehearse) if weight else (surrogate,),
        schedule=Schedule(prompts_per_step),
    )


print(prefzoo.create_algorithm("rehearsal"), "needs", sorted(prefzoo.create_algorithm("rehearsal").needs))

# %% [markdown]
# **Train it**, with rehearsal and without, everything else the same.

# %%
options = {"learning_rate": LEARNING_RATE, "max_steps": 40, "prompts_per_step": 16, "max_new_tokens": 24}
given = {"model": MODEL, "dataset": DATA, "reward": polite, **options}
models = {
    "rehearsed": prefzoo.train("rehearsal", ptx_dataset=DATA, output_dir=OUT / "rehearsed", **given),
    "unrehearsed": prefzoo.train("rehearsal", weight=0.0, output_dir=OUT / "unrehearsed", **given),
    "start": MODEL,
}

# %% [markdown]
# **What does it do?** Both earn more of the reward that they are given. Whether the sum is still right, nobody
# rewarded: that is what the rehearsal is for.

# %%
result = prefzoo.compare(models, prompts=DATA, judge="numeric", max_new_tokens=24)
print(result)
for name, texts in result.answers.items():
    print(f"{name:12} 'Gladly' per answer {sum(polite(texts)) / len(texts):.1f}   e.g. {texts[1]!r}, {texts[2]!r}")
wins = {(pair["a"], pair["b"]): pair["win"] for pair in result.pairs}
assert sum(polite(result.answers["rehearsed"])) > sum(polite(result.answers["start"])), "the reward did not rise"
assert wins["rehearsed", "unrehearsed"]["ci"][0] > 0.5, "the rehearsal had no effect"
