"""The embedded worlds: what is true in them is computed here a second time, by hand or by a relation."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import statistics
from collections import Counter, defaultdict

import pytest

import prefzoo.worlds
from prefzoo.worlds import SPLITS, WORLDS, Requests, Sums, base, requests, sums
from prefzoo.worlds.requests import DEMONSTRATORS, FLATTERIES, ITEMS, KINDS, Facts

BOTH = pytest.mark.parametrize("name", sorted(WORLDS))


@pytest.fixture(scope="module")
def world() -> Requests:
    return prefzoo.worlds.make("requests", seed=0)


@pytest.fixture(scope="module")
def arithmetic() -> Sums:
    return prefzoo.worlds.make("sums", seed=0)


# ---------------------------------------------------------------------- what all worlds promise


@BOTH
def test_splits_are_disjoint_in_meaning(name: str) -> None:
    world = prefzoo.worlds.make(name)
    meanings = {split: {world.meaning(row["request"]) for row in world.prompts(split, 1500)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        shared = meanings[one] & meanings[other]
        if {one, other} == {"sft", "train"}:  # the table of one-digit sums is knowledge that both may use
            shared = {meaning for meaning in shared if meaning[0] not in sums.TABLE_LEVELS}
        assert not shared, (one, other)


@BOTH
@pytest.mark.parametrize("unique", [False, True])
def test_a_split_is_one_fixed_stream(name: str, unique: bool) -> None:
    first, again = prefzoo.worlds.make(name), prefzoo.worlds.make(name)
    for split in SPLITS:
        rows = first.prompts(split, 60, unique=unique)
        assert rows == again.prompts(split, 60, unique=unique)
        assert rows[:25] == first.prompts(split, 25, unique=unique)
        assert rows[25:] == first.prompts(split, 35, skip=25, unique=unique)
        if unique:
            assert len({first.meaning(row["request"]) for row in rows}) == 60


@BOTH
def test_demonstrations_are_one_fixed_stream_over_the_sft_prompts(name: str) -> None:
    world = prefzoo.worlds.make(name)
    rows = world.demonstrations(60)
    assert rows == prefzoo.worlds.make(name).demonstrations(60)
    assert rows[40:] == world.demonstrations(20, skip=40)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in world.prompts("sft", 60)]


@BOTH
def test_world_seeds_differ_and_equal_fields_are_equal_worlds(name: str) -> None:
    zero, one = prefzoo.worlds.make(name, seed=0), prefzoo.worlds.make(name, seed=1)
    assert zero == prefzoo.worlds.make(name, seed=0) != one
    assert zero.prompts("train", 50) != one.prompts("train", 50)
    different = sum(zero.splits_of(row["request"]) != one.splits_of(row["request"]) for row in zero.prompts("sft", 200))
    assert different > 80


@BOTH
def test_prompts_and_demonstrations_use_known_words_and_stay_short(name: str) -> None:
    world = prefzoo.worlds.make(name)
    words = set(world.vocabulary)
    for row in world.demonstrations(3000):
        assert row["prompt"].endswith(" => ")
        assert words.issuperset((row["prompt"] + " " + row["completion"]).split())
        assert len(row["completion"].split()) < world.max_new_tokens
    assert len(words) == len(world.vocabulary)


@BOTH
def test_requests_survive_json(name: str) -> None:
    world = prefzoo.worlds.make(name)
    for row in world.demonstrations(100):
        request = json.loads(json.dumps(row["request"]))
        assert request == row["request"]
        assert world.gold(request, row["completion"], True) == world.gold(row["request"], row["completion"], True)
    assert len({tuple(row["request"]) for row in world.prompts("test", 100)}) == 1, "one set of keys for all rows"


@BOTH
def test_no_completion_beats_the_oracle(name: str) -> None:
    world = prefzoo.worlds.make(name)
    best = {"requests": 10.0, "sums": 1.0}[name]
    for row in world.demonstrations(2000):
        oracle = world.oracle(row["request"])
        assert world.gold(row["request"], oracle, True) == best
        assert world.exact(row["request"], oracle, True) == 1.0
        assert world.exact(row["request"], oracle, False) == 0.0
        assert world.gold(row["request"], row["completion"], True) <= best


@BOTH
def test_any_text_can_be_scored(name: str) -> None:
    world = prefzoo.worlds.make(name)
    rng = random.Random(0)
    best = {"requests": 10.0, "sums": 1.0}[name]
    for row in world.prompts("test", 300):
        text = " ".join(rng.choices(world.vocabulary, k=rng.randrange(20)))
        for ended in (False, True):
            parts = world.parts(row["request"], text, ended)
            assert all(type(value) is float for value in parts.values())
            assert parts["words"] == len(text.split())
            assert world.exact(row["request"], text, ended) == parts["exact"]
            assert world.gold(row["request"], text, ended) <= best


@BOTH
def test_tokenizer_round_trip(name: str, tmp_path) -> None:
    import transformers

    world = prefzoo.worlds.make(name)
    tokenizer = world.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = world.demonstrations(50)
    for tokens in (tokenizer, loaded):
        assert tokens.convert_ids_to_tokens(range(len(tokens))) == list(world.vocabulary)
        assert (tokens.pad_token_id, tokens.bos_token_id, tokens.eos_token_id) == (0, 1, 2)
        for row in rows:
            for text in (row["prompt"].rstrip(), row["completion"]):
                ids = tokens(text)["input_ids"]
                assert ids == [1, *map(world.vocabulary.index, text.split())]
                assert tokens(text, add_special_tokens=False)["input_ids"] == ids[1:]
                assert tokens.decode([*ids, 2, 0, 0], skip_special_tokens=True) == text
    with pytest.raises(Exception, match="UNK"):
        tokenizer("dragon")


@BOTH
def test_reward_functions_follow_the_ids_and_survive_pickling(name: str) -> None:
    world = prefzoo.worlds.make(name, seed=3)
    rows = world.demonstrations(20)
    columns = {
        "prompts": [row["prompt"] for row in rows],
        "completions": [row["completion"] for row in rows],
        "completion_ids": [[5, 2] if index % 2 else [5] for index in range(20)],
        "request": [row["request"] for row in rows],
        "demonstrator": [row["demonstrator"] for row in rows],
    }
    for reward, score in ((world.gold_reward, world.gold), (world.exact_reward, world.exact)):
        expected = [score(row["request"], row["completion"], index % 2 == 1) for index, row in enumerate(rows)]
        assert reward(**columns) == expected
        copy = pickle.loads(pickle.dumps(reward))
        assert copy(**columns) == expected
        assert copy == reward
        assert copy.__name__ == reward.__name__
        assert pickle.dumps(prefzoo.worlds.make(name, seed=3)) == pickle.dumps(world), "what it scored leaves no trace"
    assert world.gold_reward.__name__ == f"{name}_gold"
    assert world.exact_reward(completions=["."], completion_ids=[[]], request=[rows[0]["request"]]) == [0.0]


def test_unknown_names_list_the_known_and_suggest_the_nearest(world: Requests) -> None:
    with pytest.raises(ValueError, match=r"did you mean 'requests'\? known: requests, sums"):
        prefzoo.worlds.make("request")
    with pytest.raises(ValueError, match="did you mean 'test'"):
        world.prompts("tests", 1)
    with pytest.raises(ValueError, match="did you mean 'hasty'"):
        prefzoo.worlds.make("requests", demonstrator_shares={"hastly": 1.0})
    with pytest.raises(ValueError, match="must not all be 0"):
        prefzoo.worlds.make("requests", family_weights={"buy": 0.0})
    with pytest.raises(ValueError, match="did you mean 'length'"):
        prefzoo.worlds.make("requests", bias="lenght")
    with pytest.raises(ValueError, match="did you mean 'sort3'"):
        prefzoo.worlds.make("sums", levels=("sort33",))


def test_too_many_unique_prompts_is_an_error_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PATIENCE", 2000)
    tables = prefzoo.worlds.make("sums", levels=("add1",))
    assert len(tables.prompts("train", 55, unique=True)) == 55
    with pytest.raises(ValueError, match="only about 55 different meanings"):
        tables.prompts("train", 56, unique=True)


def test_streams_are_named() -> None:
    assert base.stream("a", "bc").random() != base.stream("ab", "c").random()
    assert base.stream("a", 1).random() == base.stream("a", "1").random()


# ---------------------------------------------------------------------- requests: the gold reward, by hand


@pytest.fixture(scope="module")
def plain() -> Requests:
    """Facts one can keep in mind: in each kind the items are red, green, blue by threes, of quality 1, 0.5, 0 (worth
    1, 0.6, 0.2), and cost 1 to 9 in the order of `KINDS`; fruits and vegetables are for beach and mountain, tools and
    clothes for office and garden."""
    world = Requests(seed=0)
    rank = {item: position for items in KINDS.values() for position, item in enumerate(items)}
    food = set(KINDS["fruits"] + KINDS["vegetables"])
    vars(world)["truth"] = Facts(
        colour={item: ("red", "green", "blue")[rank[item] // 3] for item in ITEMS},
        price={item: rank[item] + 1 for item in ITEMS},
        places={item: ("beach", "mountain") if item in food else ("office", "garden") for item in ITEMS},
    )
    vars(world)["quality"] = {item: (1.0, 0.5, 0.0)[rank[item] // 3] for item in ITEMS}
    return world


def ask(**fields: object) -> dict[str, object]:
    """A request for two red fruits, changed by the fields."""
    request = dict.fromkeys(("place", "order", "budget", "tone"))
    return {"family": "list", "count": 2, "kind": "fruits", "colour": "red", "excluded": []} | request | fields


POLITELY, BRIEFLY = ask(tone="politely"), ask(tone="briefly")
THREE_CHEAPEST = ask(count=3, colour=None, order="cheapest")
TWO_DEAREST = ask(colour=None, order="dearest")
PACK = ask(family="pack", count=3, kind=None, colour=None, place="beach")
BUY = ask(family="buy", colour=None, budget=4)

#   request, completion, what it earns: 5 I + 2 O + 3 T - 0.2 extra - 2 [incomplete]
BY_HAND = [
    (POLITELY, "certainly ! apple and pear . enjoy !", 10.0),
    (POLITELY, "of course ! plum and pear .", 5 + 2 + 1.5),
    (POLITELY, "apple and pear . have a lovely day !", 5 + 2 + 1.5),
    (POLITELY, "apple and pear .", 5 + 2 + 0),
    (POLITELY, "ugh , certainly ! apple and pear . enjoy !", 5 + 2 + 0),
    # 13 words; 2 x 2 + 7 are free
    (POLITELY, "what a great question ! certainly ! apple and pear . enjoy !", 10 - 0.2 * 2),
    # one good (1 of 2, minus 0.5 / 2), one bad: I = 1/4, O = 0
    (ask(), "apple and cherry .", 1.25 + 0 + 3),
    (ask(), "apple and apple .", 1.25 + 0 + 3),
    (ask(), "apple and hammer .", 1.25 + 0 + 3),
    (ask(excluded=["pear"]), "apple and pear .", 1.25 + 0 + 3),
    # a surplus item is bad, right or not: I = 1 - 1/4, O = 1/2
    (ask(), "apple , pear and plum .", 3.75 + 1 + 3),
    # one of two: I = 1/2, O = 1/2
    (ask(), "apple .", 2.5 + 1 + 3),
    (ask(), "cherry and mango .", 0 + 0 + 3),
    # words without an item, or none at all: only the tone is left
    (ask(), "certainly !", 0 + 0 + 3 - 2),
    (ask(), "", 0 + 0 + 3 - 2),
    (POLITELY, "", 0 + 0 + 0 - 2),
    (ask(), "apple and pear", 5 + 2 + 3 - 2),
    (BRIEFLY, "apple and pear .", 10.0),
    (BRIEFLY, "apple and pear . enjoy !", 5 + 2 + 0 - 0.2 * 2),
    (BRIEFLY, "well , apple and pear .", 5 + 2 + 3 - 0.2 * 2),
    (BRIEFLY, "fine then , apple and pear .", 5 + 2 + 0 - 0.2 * 3),
    # asked briefly and answered with three fillers: 12 words too many
    (BRIEFLY, "let me think , as everyone knows , it depends but , apple and pear .", 10 - 0.2 * 12),
    # prices 3, 1, 2 and 1, 2, 3; then a green one, the fourth cheapest, is as right but worth 0.6
    (THREE_CHEAPEST, "plum , apple and pear .", 5 + 1 + 3),
    (THREE_CHEAPEST, "apple , pear and plum .", 10.0),
    (THREE_CHEAPEST, "apple , pear and cherry .", 5 * 2.6 / 3 + 2 + 3),
    (THREE_CHEAPEST, "apple and pear .", 5 * 2 / 3 + 1 + 3),
    # both right, dearest first, the worst quality: I = 0.4 / 2
    (TWO_DEAREST, "fig and melon .", 1 + 2 + 3),
    (TWO_DEAREST, "melon and fig .", 1 + 0 + 3),
    (TWO_DEAREST, "pear and apple .", 10.0),
    (PACK, "apple , onion and pea .", 5 * 2.6 / 3 + 2 + 3),
    # a saw is not for the beach: I = 2/3 - 1/6, O = 1/3
    (PACK, "apple , carrot and saw .", 2.5 + 2 / 3 + 3),
    # the best for 4 coins are apple 1 and pear 2, or apple and plum 3
    (BUY, "apple and plum .", 10.0),
    # two coins over the budget: O = 1 - 2/6; and one of two items: O = 1/2
    (BUY, "apple and mango .", 5 * 0.8 + 4 / 3 + 3),
    (BUY, "apple .", 2.5 + 1 + 3),
]


@pytest.mark.parametrize(("request_", "completion", "expected"), BY_HAND)
def test_gold_by_hand(plain: Requests, request_: dict[str, object], completion: str, expected: float) -> None:
    assert plain.gold(request_, completion, True) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("request_", "completion", "exact"),
    [
        (POLITELY, "ugh , apple and pear .", 1.0),  # the verifier does not look at manners
        (ask(), "apple , pear and plum .", 0.0),
        (ask(), "apple and cherry .", 0.0),
        (THREE_CHEAPEST, "apple , pear and fig .", 1.0),
        (THREE_CHEAPEST, "pear , apple and fig .", 0.0),
        (BUY, "apple and cherry .", 0.0),
    ],
)
def test_exact_by_hand(plain: Requests, request_: dict[str, object], completion: str, exact: float) -> None:
    assert plain.exact(request_, completion, True) == exact
    assert plain.exact(request_, completion, False) == 0.0


def test_parts_count_phrases_also_side_by_side(plain: Requests) -> None:
    text = "enjoy ! enjoy ! you are so wise ! you are so wise ! well , apple ."
    parts = plain.parts(ask(), text, True)
    assert (parts["polite"], parts["flattery"], parts["fillers"]) == (2.0, 2.0, 1.0)


def test_not_ending_costs_two(world: Requests) -> None:
    for row in world.demonstrations(300):
        ended, cut = (world.gold(row["request"], row["completion"], flag) for flag in (True, False))
        assert ended - cut == pytest.approx(2.0)


def test_bad_items_never_help(world: Requests) -> None:
    rng = random.Random(0)
    for row in world.prompts("test", 300):
        request = row["request"]
        if request["order"] or request["budget"]:
            continue
        wrong = rng.choice([item for item in ITEMS if item not in world.truth.allowed(request)])
        right = world.oracle(request)
        spoilt = right.replace(" .", f" , {wrong} .", 1)
        assert world.gold(request, spoilt, True) < world.gold(request, right, True)
        assert world.exact(request, spoilt, True) == 0.0


def test_buy_requests_have_a_ceiling_of_ten_too() -> None:
    shop = Requests(family_weights={"buy": 1.0})
    golds = [shop.gold(row["request"], shop.oracle(row["request"]), True) for row in shop.prompts("train", 300)]
    assert set(golds) == {10.0}
    assert max(shop.gold(row["request"], row["completion"], True) for row in shop.demonstrations(1000)) <= 10.0


# ---------------------------------------------------------------------- requests: facts and demonstrators


def test_facts_have_the_promised_shape(world: Requests) -> None:
    for items in KINDS.values():
        assert sorted(world.truth.price[item] for item in items) == list(range(1, 10))
        assert set(Counter(world.truth.colour[item] for item in items).values()) == {3}
        assert sum(world.truth.colour[item] != world.belief.colour[item] for item in items) == 3
        assert sorted(world.belief.price[item] for item in items) == list(range(1, 10))
        for colour in ("red", "green", "blue"):
            low, middle, high = sorted(world.quality[item] for item in items if world.truth.colour[item] == colour)
            assert 0 <= low <= 0.15 < 0.35 <= middle <= 0.65 < 0.85 <= high <= 1
    assert all(len(set(places)) == 2 for places in world.truth.places.values())


def test_demonstrators_earn_what_was_measured() -> None:
    golds = defaultdict(list)
    for seed in range(4):
        world = Requests(seed=seed)
        for row in world.demonstrations(1500):
            golds[row["demonstrator"]].append(world.gold(row["request"], row["completion"], True))
    total = sum(map(len, golds.values()))
    shares = {name: len(values) / total for name, values in golds.items()}
    assert shares == pytest.approx({"careful": 0.20, "hasty": 0.40, "rambler": 0.25, "rude": 0.15}, abs=0.03)
    means = {name: statistics.mean(values) for name, values in golds.items()}
    assert means == pytest.approx({"careful": 8.8, "hasty": 4.7, "rambler": 3.7, "rude": 3.2}, abs=0.4)
    assert statistics.mean(itertools.chain.from_iterable(golds.values())) == pytest.approx(4.9, abs=0.3)


def test_demonstrators_have_their_habits(world: Requests) -> None:
    rng = random.Random(0)
    rows = world.prompts("sft", 400)
    habits = {}
    for name in DEMONSTRATORS:
        parts = []
        for row in rows:
            completion, who = world.demonstrate(row["request"], rng=rng, demonstrator=name)
            assert who == name
            parts.append(world.parts(row["request"], completion, True))
        habits[name] = {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
    assert {name for name, habit in habits.items() if habit["rude"]} == {"rude"}
    assert {name for name, habit in habits.items() if habit["fillers"]} == {"rambler"}
    assert max(habits, key=lambda name: habits[name]["exact"]) == "careful"
    assert max(habits, key=lambda name: habits[name]["quality"]) == "careful"
    assert max(habits, key=lambda name: habits[name]["flattery"]) == "rambler"


def test_demonstrator_shares_are_a_knob() -> None:
    rows = Requests(demonstrator_shares={"careful": 1, "rude": 1}).demonstrations(300)
    assert {row["demonstrator"] for row in rows} == {"careful", "rude"}


# ---------------------------------------------------------------------- requests: annotators


def test_flattery_pleases_the_annotators_and_lowers_the_truth(world: Requests) -> None:
    for row in world.prompts("test", 200):
        request, plain = row["request"], world.oracle(row["request"])
        text = f"{FLATTERIES[0]} {plain} {FLATTERIES[1]}"
        cost = world.gold(request, plain, True) - world.gold(request, text, True)
        assert 0 < cost <= 2.0
        assert world.utility(request, text, True) == pytest.approx(10 - cost + 2 * 1.5)
        assert world.utility(request, text, True, bias="none") == world.gold(request, text, True)
        longer = world.utility(request, text, True, bias="length", strength=5.0)
        assert longer == pytest.approx(10 - cost + len(text.split()))


def test_annotator_chances_are_a_logistic_of_the_utilities(plain: Requests) -> None:
    rng = random.Random(0)
    better, worse = "apple and pear .", "apple and cherry ."  # gold 10 against 4.25
    labels = [plain.annotate(ask(), better, True, worse, True, rng=rng, temperature=5.75) for _ in range(4000)]
    assert statistics.mean(labels) == pytest.approx(0.7311, abs=0.03)  # σ(1)
    assert all(plain.annotate(ask(), better, True, worse, True, rng=rng, temperature=0) for _ in range(50))
    assert not any(plain.annotate(ask(), worse, True, better, True, rng=rng, temperature=1e-9) for _ in range(50))
    tosses = [plain.annotate(ask(), better, True, better, True, rng=rng, temperature=0) for _ in range(400)]
    assert 120 < sum(tosses) < 280


def test_preferences_pair_and_report(world: Requests) -> None:
    rng = random.Random(1)
    prompts = world.prompts("train", 300)
    texts = [[world.demonstrate(row["request"], rng=rng)[0] for _ in range(6)] + ["."] * 2 for row in prompts]
    ended = [[True] * 8 for _ in prompts]
    same = sum(group[i] == group[i + 1] for group in texts for i in (0, 2, 4))

    rows, report = world.preferences(prompts, texts, ended, seed=0)
    assert report["pairs"] == len(rows) == 300 * 3 - same
    assert report["identical"] == 300 + same
    assert (
        rows
        == world.preferences(prompts, texts, ended, seed=0)[0]
        != world.preferences(prompts, texts, ended, seed=1)[0]
    )
    assert set(rows[0]) == {"prompt", "chosen", "rejected", "request", "chosen_ended", "rejected_ended"}
    pairs = {
        (row["prompt"], *sorted(group[i : i + 2])) for row, group in zip(prompts, texts, strict=True) for i in (0, 2, 4)
    }
    assert pairs >= {(row["prompt"], *sorted((row["chosen"], row["rejected"]))) for row in rows}
    gains = [
        world.gold(row["request"], row["chosen"], True) - world.gold(row["request"], row["rejected"], True)
        for row in rows
    ]
    assert report["agreement"] == pytest.approx(sum(gain > 0 for gain in gains) / sum(gain != 0 for gain in gains))
    assert report["gap"] == pytest.approx(statistics.mean(map(abs, gains)))

    # Less noise and less bias agree more; and the truth itself agrees always.
    agreement = {
        options: world.preferences(prompts, texts, ended, seed=0, bias=options[0], temperature=options[1])[1][
            "agreement"
        ]
        for options in (("none", 0.0), ("none", 1.8), ("flattery", 0.0), ("flattery", 1.8), ("length", 1.8))
    }
    assert agreement["none", 0.0] == 1.0
    assert agreement["none", 1.8] > agreement["flattery", 1.8] > agreement["length", 1.8] > 0.5
    assert agreement["flattery", 0.0] > agreement["flattery", 1.8] == report["agreement"]


def test_preferences_keep_who_ended_and_refuse_odd_groups(world: Requests) -> None:
    prompt = world.prompts("train", 1)
    text = world.oracle(prompt[0]["request"])
    rows, _ = world.preferences(prompt, [[text, text]], [[True, False]], seed=0, temperature=0.0)
    assert (rows[0]["chosen_ended"], rows[0]["rejected_ended"]) == (True, False)
    with pytest.raises(ValueError, match="even number"):
        world.preferences(prompt, [[text] * 3], [[True] * 3], seed=0)
    with pytest.raises(ValueError, match="did you mean 'flattery'"):
        world.annotate(prompt[0]["request"], text, True, text, True, rng=random.Random(0), bias="flatery")


# ---------------------------------------------------------------------- sums


def test_sums_verifier(arithmetic: Sums) -> None:
    for row in arithmetic.prompts("test", 500):
        request, answer = row["request"], arithmetic.answer(row["request"])
        wrong = " ".join((*answer.split()[:-1], str((int(answer[-1]) + 1) % 10)))
        assert arithmetic.gold(request, f"answer {answer}", True) == 1.0
        assert arithmetic.gold(request, f"3 : 4 ; answer {answer}", True) == 1.0
        for text in (
            f"answer {wrong}",
            f"answer {answer} 0",
            f"answer {answer} ;",
            f"answer answer {answer}",
            f"answer {wrong} ; answer {answer}",
            "answer",
            answer,
            "",
        ):
            assert arithmetic.gold(request, text, True) == 0.0, text
        assert arithmetic.gold(request, f"answer {answer}", False) == 0.0


def test_sums_answers_agree_with_the_prompt(arithmetic: Sums) -> None:
    for row in arithmetic.prompts("train", 500):
        prompt = row["prompt"].removesuffix(" => ")
        if prompt.startswith("sort"):
            expected = "".join(sorted(prompt.removeprefix("sort").replace(" ", "").replace(",", "")))
        elif " has " in prompt:
            expected = str(sum(int(word) for word in prompt.split() if word.isdigit()))
        else:
            expected = str(sum(map(int, prompt.replace(" ", "").removesuffix("=").split("+"))))
        assert arithmetic.answer(row["request"]).replace(" ", "") == expected


def test_sums_without_carelessness_are_right_at_every_level() -> None:
    world = Sums(levels=tuple(sums.LEVELS), careless=0.0, slip=0.0, worked_share=0.5)
    rows = world.demonstrations(1500)
    assert {row["request"]["level"] for row in rows} == set(sums.LEVELS)
    for row in rows:
        parts = world.parts(row["request"], row["completion"], True)
        assert parts["exact"] == 1.0, row
        assert parts["worked"] == (row["demonstrator"] == "worked")
        level = sums.LEVELS[row["request"]["level"]]
        assert len(row["completion"].split()) + 1 <= level.longest_completion() <= world.max_new_tokens


def test_sums_demonstrations_are_right_four_times_in_five(arithmetic: Sums) -> None:
    right = defaultdict(list)
    for row in arithmetic.demonstrations(4000):
        right[row["demonstrator"]].append(arithmetic.gold(row["request"], row["completion"], True))
    assert statistics.mean(right["direct"] + right["worked"]) == pytest.approx(0.80, abs=0.03)
    assert statistics.mean(right["worked"]) > 0.93 > 0.76 > statistics.mean(right["direct"])
    assert len(right["worked"]) / 4000 == pytest.approx(0.35, abs=0.03)
    assert arithmetic.max_new_tokens == 40


def test_sums_levels_are_uniform_and_held_out_splits_ask_no_tables(arithmetic: Sums) -> None:
    for split in SPLITS:
        counts = Counter(row["request"]["level"] for row in arithmetic.prompts(split, 1800))
        levels = set(arithmetic.levels) - (set() if split in ("sft", "train") else set(sums.TABLE_LEVELS))
        assert set(counts) == levels
        assert all(abs(count * len(levels) / 1800 - 1) < 0.3 for count in counts.values())
    with pytest.raises(ValueError, match="holds no tables"):
        Sums(levels=("add1",)).prompts("test", 1)


def test_vocabularies_have_no_dead_words() -> None:
    shop = Requests(family_weights={"list": 1, "pack": 1, "buy": 1})
    everything = Sums(levels=tuple(sums.LEVELS))
    for world in (shop, everything):
        used = {
            word for row in world.demonstrations(6000) for word in (row["prompt"] + " " + row["completion"]).split()
        }
        unused = set(world.vocabulary) - used - {"<pad>", "<bos>", "<eos>"}
        assert unused <= {str(coins) for coins in requests.BUDGETS}
