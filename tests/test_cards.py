"""Cards: every entry of every registry has a complete one, on the command line and as a page; and what check prints."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import prefzoo.theory
from prefzoo.algorithm import ALGORITHMS, create_algorithm, list_algorithms
from prefzoo.benchmarks import runner
from prefzoo.cli import cards, composition, main
from prefzoo.losses.base import CREDITS, ESTIMATORS, LOSSES, MODIFIERS, LossEntry
from prefzoo.parts.options import DOC
from prefzoo.records import FAMILIES
from prefzoo.registry import Entry, Registry
from prefzoo.testing import ALGORITHM_CHECKS, CHECKS
from prefzoo.theory import Finding

REGISTRIES = (LOSSES, MODIFIERS, CREDITS, ESTIMATORS)
ENTRIES = [(registry, name) for registry in REGISTRIES for name in registry.names()]
SECTIONS = ("Args:", "Returns:", "Convention:", "Known failure:", "Source:", ">>> ")
NO_PAPER = {"label_smoothing": "a note on the authors' page", "sampler_correction": "a blog post"}

MY_LOSS = """\
import torch.nn.functional as F
from prefzoo.losses import register_loss
from prefzoo.records import LossOut, Pairs

@register_loss(contrast=True)
def square_root_hinge(batch: Pairs, *, beta: float = 0.1) -> LossOut:
    "The root of one plus the squared hinge of the difference of log-ratios."
    hinge_B = F.relu(1 - beta * (batch.chosen_ratio_B - batch.rejected_ratio_B))
    return LossOut((1 + hinge_B.square()).sqrt())
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what a test registers and imports."""
    for registry in (*REGISTRIES, ALGORITHMS):
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
        monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("prefzoo_import_"):
            del sys.modules[name]


@pytest.fixture
def two_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laboratory has tests of its own: here it finds the same of every entry, at once."""
    proved, bias = ("limit", "the loss | at 0 is log 2", 1e-12, 1e-9), ("bias", "of the mean", 0.25, None)
    monkeypatch.setattr(prefzoo.theory, "findings", lambda name: [Finding(name, *proved), Finding(name, *bias)])


# ---- every entry has a complete card


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=lambda x: x if isinstance(x, str) else x.kind)
def test_cards_are_complete(registry: Registry, name: str) -> None:
    entry = registry.entry(name)
    card = inspect.getdoc(entry.function) or ""
    assert [part for part in SECTIONS if part not in card] == []
    assert [option for option in entry.own_options if not re.search(rf"^ +.*\b{option}\b.*:", card, re.M)] == []
    assert cards.section(entry, "Source") and cards.section(entry, "Convention")
    if registry in (LOSSES, MODIFIERS, ESTIMATORS):
        assert re.search(r"^    \S", card.partition("Args:")[0], re.M), "no equation before Args"
    assert (entry.paper or "").startswith("arXiv:") or name in NO_PAPER
    example = re.findall(r"^(?:>>>|\.\.\.) ", card, re.M)
    assert 1 <= len(example) <= 10
    title = entry.line
    assert title.endswith(".") and len(title) <= 120


def test_a_section_of_a_docstring_is_found() -> None:
    def function() -> None:
        """Title.

        Convention: one
        line, TRL: another.

            with an equation

        Source: someone, 2020.

        >>> 1
        1
        """

    entry = Entry("function", function)
    assert cards.section(entry, "Convention") == "one line, TRL: another. with an equation"
    assert cards.section(entry, "Source") == "someone, 2020."
    assert cards.section(entry, "Known failure") == ""


def test_every_entry_has_a_page(two_findings: None) -> None:
    pages = dict(cards.all_pages())
    expected = {f"cards/{kind}/{name}.md" for kind, registry in cards.AROUND.items() for name in registry.names()}
    algorithms = [*ALGORITHMS.names(), *ALGORITHMS.names("*:*")]
    expected |= {f"cards/{name.replace(':', '-')}.md" for name in algorithms} | {"training-options.md"}
    assert set(pages) == expected
    for path, content in pages.items():
        if path == "training-options.md":
            continue
        assert content.startswith("# ") and content.count("\n::: ") + content.count("\n```text\n") == 1
        if made := re.search(r"^::: (\S+)$", content, re.M):
            module, _, function = made[1].rpartition(".")
            assert callable(getattr(importlib.import_module(module), function))
        else:
            assert path.startswith("cards/trl-")
        assert "## What is proved\n\n- the loss \\| at 0 is log 2: 1e-12 (at most 1e-09)\n" in content
        assert "## Biases\n\n- of the mean: 0.25\n" in content


def test_the_hook_of_the_documentation_makes_those_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("pages", Path(__file__).resolve().parent.parent / ".ci" / "pages.py")
    assert spec and spec.loader
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    made: list[Any] = []
    monkeypatch.setattr(hook, "all_pages", lambda: iter([("a.md", "# a")]))
    monkeypatch.setattr(hook.File, "generated", lambda config, path, content: (path, content))
    assert hook.on_files(made, None) == [("a.md", "# a")]


# ---- list and show


def test_the_page_of_an_entry_made_by_another_function_is_its_own() -> None:
    page = cards.card_page(cards.algorithm_facts("trl:ipo", whole=True))
    assert ":::" not in page and "TRL divides each side by its length" in page and "trl.preferences" not in page
    assert "::: prefzoo.losses.pairwise.dpo" in cards.card_page(cards.loss_facts("dpo", whole=True))


def test_on_a_page_doctests_are_code_and_what_is_returned_is_a_paragraph() -> None:
    griffe = pytest.importorskip("griffe")
    path = Path(cards.__file__).parents[1] / ".ci" / "examples.py"
    spec = importlib.util.spec_from_file_location("examples", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "A.\n\nReturns:\n    One, (B,): of\n    two.\n\n>>> f(\n...     [[1]])\n[[1]]\n\nEnd.\n\n>>> g()\n2"
    entry = griffe.Function("f")
    entry.docstring = griffe.Docstring(text)
    module.Examples().on_instance(obj=entry)
    assert entry.docstring.value == (
        "A.\n\n**Returns:** One, (B,): of two.\n\n```pycon\n>>> f(\n...     [[1]])\n[[1]]\n```\n\nEnd.\n\n"
        "```pycon\n>>> g()\n2\n```"
    )


@pytest.mark.parametrize("kind", ["algorithms", "losses"])
@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_list_can_be_read_in_any_terminal(
    command: Command, monkeypatch: pytest.MonkeyPatch, kind: str, width: int
) -> None:
    """What an entry is takes three lines at most, and nothing is cut off."""
    monkeypatch.setattr(cards, "wide_console", lambda: Console(width=width))
    code, out, _ = command("list", kind, *(["--lines"] if kind == "algorithms" else []))
    names = re.findall(r"^(\S+)", out, re.M)[1:]
    assert code == 0 and "…" not in out and max(map(len, out.splitlines())) <= width
    assert {*names} >= {*(list_algorithms() if kind == "algorithms" else LOSSES.names())}
    assert (
        max(len(part.splitlines()) for part in re.split(r"^(?=\S)", out, flags=re.M)) <= 4
    )  # an empty line may end it


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_table_of_algorithms_can_be_read_in_any_terminal(
    command: Command, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """A narrow terminal gets fewer columns; nothing is cut off, and one stage fills eight lines at most."""
    monkeypatch.setattr(cards, "wide_console", lambda: Console(width=width))
    code, out, _ = command("list", "algorithms")
    assert code == 0 and "…" not in out and max(map(len, out.splitlines())) <= width
    assert out.splitlines()[0].split() == ["name", *cards.MADE_OF[{80: 0, 120: 100, 160: 150}[width]]]
    parts = {part.split()[0]: part.splitlines() for part in re.split(r"^(?=\S)", out, flags=re.M)[1:]}
    assert set(parts) == {"name", *list_algorithms()}
    for row in (cards.algorithm_facts(name) for name in list_algorithms()):
        assert len(parts[row["name"]]) <= 8 * len(row["stages"]), row["name"]


@pytest.mark.parametrize("name", list_algorithms())
def test_what_the_table_says_follows_from_the_parts(name: str) -> None:
    algorithm = create_algorithm(name)
    facts = cards.algorithm_facts(name)
    assert len(facts["stages"]) == max(1, len(algorithm.stages))
    for stage, row in zip(algorithm.stages, facts["stages"], strict=False):
        assert all(row[column] for column in composition.COLUMNS)
        assert (row["reference"] != composition.NONE) == ("reference" in stage.needs)
        assert set(row["count"].split(", ")) == {t.counted.unit for t in stage.terms}
        assert [t.loss.name in row["terms"] for t in stage.terms] == [True] * len(stage.terms)
        assert set(re.findall(r"→ ([\w:]+)", row["terms"])) == {*stage.trains} - {"policy"}
        assert ("rollout" in row["source"]) == stage.on_policy
    assert "policy" not in facts["needs"] and {*facts["needs"]} - {"verifier"} <= algorithm.needs
    verified = "verifier" in [row["feedback"] for row in facts["stages"]]
    assert ("verifier" in facts["needs"]) == verified
    for column in composition.COLUMNS:
        assert facts[column].split(" → ")[0] == facts["stages"][0][column].split(" → ")[0]


def test_options_that_are_shared_are_explained_on_the_card(command: Command) -> None:
    out = command("show", "rloo", "--quick")[1]
    facts = json.loads(command("show", "rloo", "--quick", "--json")[1])
    assert facts["shared"]["group_size"] == DOC["group_size"] and facts["options"]["group_size"] == 4
    assert re.search(r"^ +group_size +completions sampled per prompt", out, re.M)
    assert "completions sampled per prompt" in cards.card_page(cards.algorithm_facts("rloo", whole=True))


def test_list_losses_lists_what_stands_around_them_too(command: Command) -> None:
    rows = json.loads(command("list", "losses", "--json")[1])
    kinds = {"loss": LOSSES, "modifier": MODIFIERS, "credit": CREDITS, "KL estimator": ESTIMATORS}
    assert [(row["kind"], row["name"]) for row in rows] == [(k, n) for k, r in kinds.items() for n in r.names()]
    for word, registry in cards.AROUND.items():
        if word != "losses":
            assert [row["name"] for row in json.loads(command("list", word, "--json")[1])] == registry.names()
    code, out, _ = command("list", "losses", "k[123]")
    assert code == 0 and re.findall(r"^(\S+) .* KL estimator ", out, re.M) == ["k1", "k2", "k3"]
    code, _, err = command("list", "credits", "gea")
    assert code == 2 and "did you mean 'gae'?" in err
    assert "did you mean 'credits'?" in command("list", "credit", "gae")[2]


def test_a_card_tells_the_options_of_its_modifiers_apart(command: Command) -> None:
    facts = json.loads(command("show", "dpo", "--json", "--quick")[1])
    entry = LOSSES.entry("dpo")
    assert isinstance(entry, LossEntry)
    assert facts["options"] == {"beta": 0.1}
    assert (
        facts["modifiers"] == {m.name: m.options for m in entry.modifiers} and "label_smoothing" in facts["modifiers"]
    )
    out = command("show", "dpo", "--quick")[1]
    assert "Rafailov" in out and re.search(r"^with label_smoothing +label_smoothing=0.0 *$", out, re.M)


@pytest.mark.parametrize("name", ["nll", "gae", "k3_straight", "clipped_value", "bradley_terry"])
def test_what_is_no_algorithm_has_a_card(command: Command, name: str) -> None:
    registry = next(r for r in REGISTRIES if name in r)
    facts = json.loads(command("show", name, "--json", "--quick")[1])
    assert (facts["name"], facts["paper"]) == (name, registry.entry(name).paper)
    code, out, _ = command("show", name, "--quick")
    assert code == 0 and "Convention:" in out and Path(facts["file"]).name in out


def test_the_card_of_a_modifier_says_what_it_applies_to(command: Command) -> None:
    facts = json.loads(command("show", "nll", "--json", "--quick")[1])
    assert "dpo" in facts["applies_to"] and facts["refused_by"]["cpo"] == "the loss has an option 'nll' of its own"
    family = [n for n in LOSSES.names() if LOSSES.entry(n).tags["family"].__name__ == "Pairs"]
    assert sorted([*facts["applies_to"], *facts["refused_by"]]) == family


def test_a_card_states_what_is_proved_and_what_is_not(command: Command) -> None:
    code, out, _ = command("show", "k3")
    assert code == 0
    found = prefzoo.theory.findings("k3")
    assert found and all(f.words in out for f in found) and "\nwhat is proved\n" in out
    assert "what is proved" not in command("show", "k3", "--quick")[1]
    told = json.loads(command("show", "k3", "--json")[1])["proved"]
    assert told == [vars(f) | {"holds": f.holds} for f in found]
    exceptions = json.loads(command("show", "--loss", "discopop", "--json", "--quick")[1])["exceptions"]
    assert exceptions == LOSSES.entry("discopop").tags["exceptions"] != {}
    assert re.search(r"^breaks +prefers_chosen: not convex", command("show", "discopop", "--quick")[1], re.M)


def test_a_claim_that_does_not_hold_is_not_called_proved(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setattr(prefzoo.theory, "findings", lambda name: [Finding(name, "limit", "wrong", 1.0, 1e-9)])
    out = command("show", "--loss", "sft")[1]
    assert "what does not hold\n  wrong: 1" in out and "what is proved" not in out
    assert "## What does not hold" in cards.card_page(cards.loss_facts("sft", whole=True))


def test_trl_names_say_what_they_resolve_to_and_why(command: Command, two_findings: None) -> None:
    out = command("show", "trl:ipo")[1]
    assert "resolves to: ipo with beta=0.1, mean over row\n" in out
    why = cards.section(LOSSES.entry("ipo"), "Convention")
    assert "TRL" in why and f"why ipo: {why}\n" in out
    for name in ALGORITHMS.names("trl:*"):
        terms = json.loads(command("show", name, "--json", "--quick")[1])["resolves_to"]
        assert terms and all(term["loss"] in LOSSES for term in terms)
    assert "resolves_to" not in json.loads(command("show", "ipo", "--json", "--quick")[1])


def test_an_unknown_name_is_told_with_the_nearest_of_any_kind(command: Command) -> None:
    assert "did you mean 'top_against_bottom'?" in command("show", "top_against_botom")[2]


# ---- check


def test_check_tells_how_every_check_went(command: Command) -> None:
    code, out, _ = command("check", "discopop", "sft", "--json")
    first, second = json.loads(out)
    assert code == 0 and (first["name"], second["name"]) == ("discopop", "sft")
    for result in (first, second):
        told = [*result["passed"], *result["exceptions"], *result["not_applicable"]]
        assert sorted(told) == sorted(CHECKS) and result["failed"] == {}
    assert first["exceptions"] == LOSSES.entry("discopop").tags["exceptions"]
    assert second["not_applicable"]["swap"] == "Likelihood has no sides to exchange"
    code, out, _ = command("check", "discopop", "sft")
    assert code == 0 and "prefers_chosen: not convex" in out and "2 of 2 losses keep the contract" in out
    code, out, _ = command("check", "sft")
    assert code == 0 and all(re.search(rf"^{name} +(passed|not applicable)", out, re.M) for name in CHECKS)


def test_check_trains_algorithms(command: Command) -> None:
    """What is no loss is checked as an algorithm, what is both where that is asked."""
    code, out, _ = command("check", "reward_model")
    assert code == 0 and re.search(r"^learns +passed +scores are the true rewards", out, re.M)
    code, out, _ = command("check", "--algorithm", "sft", "--json")
    (result,) = json.loads(out)
    assert code == 0 and result["kind"] == "algorithm" and "ends at the policy" in result["seen"]["learns"]
    assert sorted([*result["passed"], *result["not_applicable"]]) == sorted(ALGORITHM_CHECKS)
    code, _, err = command("check", "--algorithm", "sftt")
    assert code == 2 and "did you mean 'sft'" in err


def test_check_of_everything_is_every_loss(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefzoo.cli.check

    monkeypatch.setattr(prefzoo.cli.check, "loss_checks", lambda loss: [])
    assert [row["name"] for row in json.loads(command("check", "--json")[1])] == LOSSES.names()


def test_a_broken_loss_fails_with_cause_and_cure(command: Command, tmp_path: Path, restored: None) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MY_LOSS.replace(".sqrt()", ".sqrt().mean()"))
    code, out, _ = command("check", "square_root_hinge", "sft", "--import", file)
    assert code == 1 and "Was it averaged?" in out and "1 of 2 losses keep the contract" in out
    code, out, _ = command("check", "square_root_hinge", "--import", file)
    assert code == 1 and re.search(r"^unreduced +FAILED", out, re.M)
    failed = json.loads(command("check", "square_root_hinge", "--import", file, "--json")[1])[0]["failed"]
    assert "unreduced" in failed


def test_check_at_other_options(command: Command) -> None:
    code, out, _ = command("check", "bradley_terry", "-s", "centering=0.1", "--json")
    (result,) = json.loads(out)
    assert code == 0 and result["options"] == {"centering": 0.1} and "reward_shift" in result["exceptions"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dop"], "did you mean 'dpo'?"),
        (["nll"], "it is checked with every loss that it applies to"),
        (["gae"], "is no loss (credit)"),
        (["dpo", "-s", "bta=1"], "did you mean 'beta'?"),
        (["-s", "beta=1"], "name one"),
        (["--theory", "dop"], "did you mean 'dpo'?"),
        (["--theory", "k1", "-s", "beta=1"], "no effect on --theory"),
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_words(command: Command, words: list[str], said: str) -> None:
    code, out, err = command("check", *words)
    assert code == 2 and said in err and out == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dop"], "no entry 'dop'; did you mean 'dpo'? 'prefzoo list' and 'prefzoo list losses' show the names"),
        (["TRL:ipo"], "did you mean 'trl:ipo'?"),
        (["trl:dpoo"], "did you mean 'trl:dpo'? 'prefzoo list algorithms \"*:*\"' shows"),
        (["--loss", "ppo"], "'ppo' is an algorithm and no loss; its losses: clipped_surrogate, clipped_value."),
        (["--loss", "odp"], "which 'prefzoo list losses' shows"),
    ],
    ids=" ".join,
)
def test_names_that_are_none_are_told_where_to_look(command: Command, words: list[str], said: str) -> None:
    code, out, err = command("show", *words)
    assert code == 2 and said in err and out == ""


def test_check_prints_the_theory(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command("check", "--theory", "k1", "k2", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["entry"] for row in rows} == {"k1", "k2"}
    assert rows == [vars(f) | {"holds": f.holds} for name in ("k1", "k2") for f in prefzoo.theory.findings(name)]
    code, out, _ = command("check", "--theory", "k1")
    assert code == 0 and re.search(r"^k1 +expectation +its mean is KL", out, re.M)
    wrong = [Finding("k1", "bias", "of the mean", 0.5, None), Finding("k1", "limit", "wrong", 1.0, 1e-9)]
    monkeypatch.setattr(prefzoo.theory, "findings", lambda name: wrong)
    code, out, _ = command("check", "--theory", "k1")
    assert code == 1 and re.search(r"of the mean +0.5 +a bias +stated", out) and re.search(r"wrong +1 +1e-09 +NO", out)
    monkeypatch.setattr(prefzoo.theory, "findings", lambda name: [])
    assert (
        command("check", "--theory", "whiten")[:2] != (0, "")
        and "no theorem speaks of whiten" in (command("check", "--theory", "whiten")[1])
    )


# ---- ten lines of a user


def test_ten_lines_show_up_in_list_show_check_train_and_bench(
    command: Command, tmp_path: Path, restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training of a suite in other processes is in test_benchmarks; here its plan has the loss."""
    assert len(MY_LOSS.splitlines()) <= 10
    file, name = tmp_path / "my_losses.py", "square_root_hinge"
    file.write_text(MY_LOSS)
    mine = ("--import", file)
    assert name in [row["name"] for row in json.loads(command("list", "losses", *mine, "--json")[1])]
    assert name in [row["name"] for row in json.loads(command("list", *mine, "--json")[1])]
    code, out, _ = command("show", name, *mine)
    assert code == 0 and "The root of one plus" in out and "with label_smoothing" in out
    code, out, _ = command("check", name, *mine)
    assert code == 0 and "FAILED" not in out
    assert command("check", name, *mine, "-s", "label_smoothing=0.1")[0] == 0

    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n} and 1 is", "chosen": f" {n + 1}", "rejected": f" {n + 2}"} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = ("train", name, *mine, "--model", "tiny", "--dataset", pairs, "--max-steps", 1, "--quiet")
    code, _, err = command(*train, "--output-dir", tmp_path / "run", "--beta", "0.5", "--label-smoothing", "0.1")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["options"] == {"beta": 0.5, "label_smoothing": 0.1}

    planned: list[str] = []

    def jobs_of(jobs: Any, *_: Any, imports: Any, **__: Any) -> None:
        planned.extend(job.name for job in jobs)
        assert imports == [file.resolve()]
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_jobs", jobs_of)
    command("bench", "quick", *mine, "--algorithms", f"dpo,{name}", "--out", tmp_path / "bench")
    assert f"requests/{name}/0" in planned and "requests/dpo/0" in planned


def test_the_page_of_the_losses_names_every_entry() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "losses.md").read_text(encoding="utf-8")
    links = {f"[`{n}`](cards/{kind}/{n}.md)" for kind, registry in cards.AROUND.items() for n in registry.names()}
    assert sorted(link for link in links if link not in page) == []
    assert set(re.findall(r"\[`\w+`\]\(cards/\S+?\)", page)) == links
    assert all(f"`{family.__name__}`" in page for family in FAMILIES)
