"""The command line: what it prints, what it writes, and what it says when something is wrong."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import prefzoo
import prefzoo.benchmarks
from prefzoo.algorithm import ALGORITHMS, list_algorithms
from prefzoo.cli import families, main
from prefzoo.losses import LOSSES
from prefzoo.plugins import import_file, import_function
from prefzoo.registry import UsageError

ROOT = Path(__file__).resolve().parent.parent

MY_LOSS = """\
import torch.nn.functional as F
from prefzoo.losses import register_loss
from prefzoo.records import LossOut, Pairs

@register_loss
def squared_hinge(batch: Pairs, *, beta: float = 0.1) -> LossOut:
    "The squared hinge of the difference of log-ratios."
    return LossOut(F.relu(1 - beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)).square())
"""


@pytest.fixture
def command(capsys):
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def restored():
    """Take back what a test registers."""
    before = [(table, dict(table)) for r in (LOSSES, ALGORITHMS) for table in (r._entries, r._aliases)]
    modules = set(sys.modules)
    yield
    for table, content in before:
        table.clear()
        table.update(content)
    for name in set(sys.modules) - modules:
        if name.startswith("prefzoo_import_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    things, colours = ("sky", "grass", "snow", "coal"), ("blue", "green", "white", "black")
    rows = [
        {"prompt": f"The {thing} is", "chosen": f" {right}.", "rejected": f" {wrong}."}
        for thing, right in zip(things, colours, strict=True)
        for wrong in colours
        if wrong != right
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def written(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# ---- help


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_and_version_do_not_import_torch(words):
    code = "import sys; from prefzoo.cli import main; sys.exit(main(sys.argv[1:]) or 9 * ('torch' in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_version(command):
    assert command("--version") == (0, f"prefzoo {prefzoo.__version__}\n", "")


def test_the_installed_command_is_this_one():
    result = subprocess.run([Path(sys.executable).parent / "prefzoo", "show", "dop"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: no entry 'dop'; did you mean 'dpo'?")
    assert result.stdout == "" and "Traceback" not in result.stderr


# ---- list and show


def test_list_as_json_has_every_algorithm(command):
    code, out, _ = command("list", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["name"] for row in rows] == list_algorithms()
    assert all(row["line"] for row in rows)
    assert {row["name"]: row["needs"] for row in rows}["ppo"] == ["critic", "reference", "reward"]


def test_list_with_a_pattern(command):
    names = lambda *words: [row["name"] for row in json.loads(command("list", *words, "--json")[1])]  # noqa: E731
    assert names("losses", "ipo*") == ["ipo", "ipo_sum"]
    assert names("algorithms", "*po") == names("*po") == list_algorithms("*po")
    assert [name for name in names("losses") if name in LOSSES] == LOSSES.names()
    assert names("nothing*") == []


def test_list_prints_one_line_of_each(command):
    code, out, _ = command("list", "losses")
    assert code == 0 and all(any(line.startswith(f"{name} ") for line in out.splitlines()) for name in LOSSES.names())


def test_list_without_a_match_says_so(command):
    code, _, err = command("list", "algorithms", "dop")
    assert code == 2 and "did you mean 'dpo'?" in err


def test_an_algorithm_that_has_no_default_does_not_hide_the_others(command, restored):
    @prefzoo.register_algorithm
    def stubborn(*, weight: float) -> prefzoo.Algorithm:
        "Needs a weight."

    rows = {row["name"]: row for row in json.loads(command("list", "--json")[1])}
    assert "cannot be made" in rows["stubborn"]["learns_from"] and "dpo" in rows


@pytest.mark.parametrize("name", sorted({*list_algorithms(), *LOSSES.names()}))
def test_every_card_can_be_shown(command, name):
    code, out, _ = command("show", name, "--quick")
    facts = json.loads(command("show", name, "--quick", "--json")[1])
    assert code == 0 and facts["name"] == name and facts["doc"].splitlines()[0] in out
    for option, default in facts["options"].items():
        assert f"{option}={default if isinstance(default, str) else json.dumps(default)}" in " ".join(out.split())


def test_card_of_an_algorithm_and_of_its_loss(command):
    algorithm = json.loads(command("show", "dpo", "--quick", "--json")[1])
    loss = json.loads(command("show", "--loss", "dpo", "--quick", "--json")[1])
    assert (algorithm["kind"], loss["kind"]) == ("algorithm", "loss")
    assert algorithm["recommended"] == {"learning_rate": 1e-6} and algorithm["training"]["learning_rate"] == 1e-6
    assert algorithm["losses"] == ["dpo"] and "DatasetRows" in algorithm["composition"]
    assert loss["family"] == "Pairs" and loss["needs"] == ["reference"]


def test_card_by_alias(command):
    assert json.loads(command("show", "ppo_rlhf", "--quick", "--json")[1])["name"] == "ppo"


# ---- train


def test_train_writes_a_model_and_says_where(command, pairs, tmp_path):
    out = tmp_path / "dpo"
    code, said, _ = command(
        "train", "dpo", "--model", "tiny", "--dataset", pairs, "--output-dir", out, "--max-steps", 2,
        "--beta", "0.2", "--learning-rate=1e-3", "-s", "max-grad-norm=null", "--seed", 3,
    )  # fmt: skip
    assert code == 0
    assert (out / "final" / "model.safetensors").exists() and f"{out}/final" in said and "rewards/margins" in said
    record = written(out)
    assert record["options"] == {"beta": 0.2}
    given = {"learning_rate": 1e-3, "max_grad_norm": None, "seed": 3, "max_steps": 2}
    assert record["given"] | given == record["given"]


def test_command_line_wins_over_the_file(command, pairs, tmp_path):
    options = "learning_rate: 1e-4\nrows-per-step: 4\nbeta: 3e-1\nmax_steps: 1\n"
    file = tmp_path / "run.yaml"
    file.write_text(f"algorithm: dpo\nmodel: tiny\ndataset: {pairs}\noutput_dir: {tmp_path}/of_the_file\n" + options)
    assert command("train", "--config", file, "--quiet")[0] == 0
    of_the_file = written(tmp_path / "of_the_file")
    assert of_the_file["options"] == {"beta": 0.3} and of_the_file["given"]["learning_rate"] == 1e-4
    words = ("--output-dir", tmp_path / "mine", "--beta", "0.4", "--rows-per-step", 6)
    assert command("train", "ipo", "--config", file, *words, "--quiet")[0] == 0
    mine = written(tmp_path / "mine")
    assert (mine["algorithm"], mine["options"], mine["given"]["rows_per_step"]) == ("ipo", {"beta": 0.4}, 6)


def test_train_with_a_function_of_the_users(command, pairs, tmp_path, restored):
    file = tmp_path / "my_rewards.py"
    file.write_text("def brief(completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    short = ("--group-size", 2, "--prompts-per-step", 2, "--max-new-tokens", 4, "--max-steps", 1, "--quiet")
    start = ("train", "grpo", "--model", "tiny", "--dataset", pairs)
    code, said, err = command(*start, "--output-dir", tmp_path / "a", "--reward", f"{file}:brief", *short)
    assert code == 0, err
    assert "reward -" in said
    code, _, err = command(*start, "--output-dir", tmp_path / "b", "--reward", f"{file}:brif", *short)
    assert code == 2 and "did you mean 'brief'?" in err


def test_a_loss_from_a_users_file_is_listed_shown_and_trained(command, pairs, tmp_path, restored):
    file = tmp_path / "my_losses.py"
    file.write_text(MY_LOSS)
    names = [row["name"] for row in json.loads(command("list", "losses", "--import", file, "--json")[1])]
    assert "squared_hinge" in names
    assert "The squared hinge" in command("show", "squared_hinge", "--import", file)[1]
    train = ("train", "squared_hinge", "--import", file, "--model", "tiny", "--dataset", pairs, "--max-steps", 1)
    code, _, err = command(*train, "--output-dir", tmp_path / "run", "--beta", "0.5", "--quiet")
    assert code == 0, err
    assert written(tmp_path / "run")["options"] == {"beta": 0.5}


# ---- mistakes, in words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dop"], "did you mean 'dpo'?"),
        (["dpo", "--bta", "0.2"], "did you mean 'beta'?"),
        (["dpo", "--learning-rat", "1"], "did you mean 'learning_rate'?"),
        (["dpo", "--datset", "x"], "did you mean 'dataset'?"),
        (["dpo", "--rows-per-step", "-1"], "greater than 0"),
        (["--beta", "0.2", "dpo"], "the algorithm's name comes first"),
        (["dpo", "-s", "beta"], "expected KEY=VALUE"),
        (["dpo", "--dataset", "absent.jsonl"], "no such file"),
        (["dpo", "--config", "absent.yaml"], "cannot be read"),
        (["dpo", "--import", "absent.py"], "no such file"),
        (["rlvr"], "needs a reward"),
        (["rlvr", "--reward", "exakt"], "did you mean 'exact'?"),
        (["grpo", "--rows-per-step", "2"], "'rows_per_step' has no effect on 'grpo'"),
        ([], "which algorithm?"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_mistakes_are_told_in_words(command, pairs, tmp_path, words, said):
    start = [] if "--dataset" in words else ["--dataset", pairs]
    code, out, err = command("train", *words, "--model", "tiny", *start, "--output-dir", tmp_path / "out", "--quiet")
    assert code == 2 and said in err and out == "" and "Traceback" not in err
    assert not (tmp_path / "out" / "final").exists()


def test_a_bad_line_of_the_data_is_named(command, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\nnot json\n')
    code, _, err = command("train", "dpo", "--model", "tiny", "--dataset", file, "--output-dir", tmp_path / "out")
    assert code == 2 and "line 2 is not JSON" in err


def test_no_model(command, pairs):
    code, _, err = command("train", "dpo", "--dataset", pairs)
    assert code == 2 and "--model" in err


def test_bad_config(command, tmp_path):
    file = tmp_path / "run.yaml"
    for text, said in (("a: [1", "is not YAML"), ("- 1", "expected lines of the form 'key: value'")):
        file.write_text(text)
        code, _, err = command("train", "dpo", "--config", file)
        assert code == 2 and said in err


def test_a_run_that_diverges_stops_in_words(command, pairs, tmp_path):
    diverging = ("--optimizer", "sgd", "--learning-rate", "1e30", "--max-grad-norm", "null", "--warmup-steps", 0)
    start = ("train", "sft", "--model", "tiny", "--dataset", pairs, "--max-steps", 3, "--output-dir", tmp_path / "out")
    code, _, err = command(*start, *diverging, "--quiet")
    assert code == 2 and "not finite" in err and "Traceback" not in err


def test_debug_shows_where(command):
    assert "Traceback" in command("show", "dop", "--debug")[2]
    assert "Traceback" in command("--debug", "show", "dop")[2]


def test_ctrl_c(command, pairs, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    import prefzoo.cli.training

    monkeypatch.setattr(prefzoo.cli.training, "train_algorithm", stop)
    code, _, err = command("train", "dpo", "--model", "tiny", "--dataset", pairs, "--output-dir", tmp_path / "out")
    assert (code, err) == (130, "interrupted\n")


def test_unknown_command(command):
    assert command("trian")[0] == 2


# ---- bench and report hand over to the harness


def test_bench_hands_its_options_over(command, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(prefzoo.benchmarks, "run", lambda suite, **given: calls.append((suite, given)), raising=False)
    assert command("bench", "quick")[0] == 0
    words = ("--data", "d.jsonl", "--algorithms", "dpo, kto", "--seeds", 3, "--out", tmp_path, "--workers", 2)
    words += ("--executor", "ray", "--device", "auto", "-s", "start.model=tiny", "--set", "decoding.samples=2")
    assert command("bench", "pairs", *words, "--import", "a.py", "--import", "b.py")[0] == 0
    nothing = {"algorithms": None, "seeds": None, "data": None, "changes": {}, "imports": [], "workers": None}
    assert calls[0] == ("quick", {"out": Path("runs/quick"), "executor": "workers", "device": "cpu", **nothing})
    assert calls[1] == (
        "pairs",
        {
            "out": tmp_path, "algorithms": ["dpo", "kto"], "seeds": 3, "data": "d.jsonl", "workers": 2,
            "changes": {"start.model": "tiny", "decoding.samples": 2}, "executor": "ray", "device": "auto",
            "imports": [Path("a.py"), Path("b.py")],
        },
    )  # fmt: skip


def test_a_mistake_in_a_suite_is_told_in_words_and_nothing_is_made(command, tmp_path):
    (tmp_path / "mine.yaml").write_text("like: requests\nsedes: 3\nalgorithms: [dpo]")
    code, out, err = command("bench", tmp_path / "mine.yaml", "--out", tmp_path / "out")
    assert code != 0 and out == "" and "mine.yaml" in err and "no key 'sedes'; did you mean 'seeds'?" in err
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_plan_says_how_many_prompts_and_seeds_a_difference_needs(command, tmp_path):
    code, out, _ = command("bench", "quick", "--plan", "--points", 5, "--out", tmp_path)
    assert code == 0 and "no finished runs" in out and "5" in out and "prompts" in out and "seeds" in out
    _, wide, _ = command("bench", "quick", "--plan", "--points", 5, "--seed-sd", 6, "--out", tmp_path)
    assert "6 points, as given" in wide and wide.splitlines()[1:] != out.splitlines()[1:]


def test_suites_are_listed(command):
    code, out, _ = command("list", "suites", "--json")
    assert code == 0 and json.loads(out) == prefzoo.benchmarks.list_suites()
    assert command("list", "suites", "qu*")[1].count("quick") == 1


def test_report(command, monkeypatch, tmp_path):
    monkeypatch.setattr(prefzoo.benchmarks, "report", lambda out, again: f"tables of {out}, {again}", raising=False)
    assert command("report", tmp_path) == (0, f"tables of {tmp_path}, False\n", "")
    assert command("report", tmp_path, "--recompute") == (0, f"tables of {tmp_path}, True\n", "")


# ---- the pages name what there is


def test_the_map_of_the_algorithms_says_what_the_registry_says():
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    assert families.filled(page, families.members()) == page, "python -m prefzoo.cli.families docs/algorithms.md"
    assert sorted(re.findall(r"^\| \[`(\w+)`\]", page, re.M)) == ALGORITHMS.names(), "a family has no section"
    assert families.filled(page.replace("| labels |", "| nothing |"), families.members()) == page


def test_the_readme_names_every_algorithm():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    table = page.partition("## The algorithms")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", "".join(line for line in table.splitlines() if line.startswith("|")))
    assert [name for name in ALGORITHMS.names() if name not in named] == []
    assert [name for name in named if name not in list_algorithms()] == []


# ---- doctor


def test_a_dry_run_takes_the_options_of_evaluation_and_keeps_nothing(command, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = ("--model", "tiny", "--dataset", pairs, "--cache-dir", "cache", "--eval-split", 0.2)
    watched = ("--eval-steps", 1, "--best-metric", "loss", "--best-mode", "min", "--patience", 2, "--output-dir", "out")
    (tmp_path.parent / "short.py").write_text(
        "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
    )
    reward = f"{tmp_path.parent}/short.py:short"
    sampled = ("--eval-samples", 2, "--reward", reward, "--max-new-tokens", 2, "--group-size", 2)
    for words in (("dpo", *shared, *watched), ("grpo", *shared, *sampled)):
        code, out, err = command("doctor", *words)
        assert code == 0, err
        assert "step 2" in out and not list(tmp_path.iterdir())


# ---- users' files


def test_a_file_is_imported_once_however_it_is_written(tmp_path, monkeypatch, restored):
    (tmp_path / "mine.py").write_text("things = []\n")
    monkeypatch.chdir(tmp_path)
    first = import_file("mine.py")
    assert import_file(tmp_path / "mine.py") is first
    assert import_file(tmp_path / ".." / tmp_path.name / "mine.py") is first


def test_two_files_of_one_name_do_not_meet(tmp_path, restored):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "losses.py").write_text(f"place = {place!r}\n")
    assert [import_file(tmp_path / p / "losses.py").place for p in ("a", "b")] == ["a", "b"]
    assert "losses" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = \n", "line 2: SyntaxError"),
        ("x = 1\n\nundefined\n", "line 3: NameError"),
        ("import a_helper_beside_it\n", "PYTHONPATH"),
    ],
)
def test_a_file_that_fails_says_where(tmp_path, text, said, restored):
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        import_file(file)
    file.write_text("x = 1\n")
    assert import_file(file).x == 1  # a failed import leaves nothing behind


def test_a_name_that_is_taken_is_refused(tmp_path, restored):
    file = tmp_path / "mine.py"
    file.write_text(MY_LOSS.replace("squared_hinge", "dpo"))
    LOSSES.names()
    with pytest.raises(UsageError, match="'dpo' is already registered"):
        import_file(file)


def test_a_function_by_name(tmp_path, restored):
    (tmp_path / "mine.py").write_text("def f():\n    return 7\n")
    assert import_function(f"{tmp_path}/mine.py:f")() == 7


def test_numbers_of_the_command_line_are_those_of_the_file():
    from prefzoo.cli.training import Numbers, read_value

    for text in ("1e-5", "1E3", "-2e-3", "1.5e3", "3", "0.1", "true", "null", "[1e-1, 2]", "text", "runs/1e-5/final"):
        assert read_value(text) == yaml.load(f"key: {text}", Loader=Numbers)["key"]
    assert read_value("1e-5") == 1e-5 and read_value("-2e-3") == -0.002 and read_value("runs/1e-5") == "runs/1e-5"
