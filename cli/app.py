"""The commands and their options; what they do is in the modules beside this one, imported when a command runs."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import prefzoo
from prefzoo.registry import RunError, UsageError

app = typer.Typer(
    name="prefzoo",
    help="Preference-optimization algorithms by name: look them up, train with them, compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Imports = Annotated[
    list[Path],
    typer.Option("--import", metavar="FILE.py", help="a file of yours that registers losses or algorithms; repeatable"),
]
Settings = Annotated[list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="any option; repeatable")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="OURS=THEIRS,...", help="what the data calls our columns: chosen=good,rejected=bad"),
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")]
TopP = Annotated[float, typer.Option(help="smallest set of tokens with this much probability")]
NewTokens = Annotated[int, typer.Option(min=1, help="limit of an answer, in tokens")]
Seed = Annotated[int, typer.Option(help="of the sampling")]
Revision = Annotated[str | None, typer.Option(help="branch, tag or commit of a model on the hub")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run Python code that comes with the model")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point: run a command, tell the user's mistakes in words, and return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # wherever it stands
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="prefzoo")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if code == 130:  # Ctrl-C, as typer reports it
            print("interrupted", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UsageError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _version(wanted: bool) -> None:
    if wanted:
        print(f"prefzoo {prefzoo.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and leave")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error; may stand anywhere")] = False,
) -> None:
    pass


@app.command("list")
def list_(
    kind: Annotated[
        str, typer.Argument(metavar="[algorithms|losses|modifiers|credits|estimators|suites]", show_default=False)
    ] = "algorithms",
    pattern: Annotated[str | None, typer.Argument(metavar="[PATTERN]", help="shell pattern, such as '*po'")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="of algorithms: what each is, not what it is made of")] = False,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """What there is: each algorithm with the parts it is made of; or each loss, and the functions around losses.

    'losses' lists modifiers, credit functions and KL estimators too; each has a word that lists it alone.
    """
    from prefzoo.cli import cards

    if kind == "suites":
        from prefzoo.cli import bench as suites

        return suites.show_suites(pattern or "*", imports, as_json)
    if pattern is None and kind not in cards.KINDS:  # prefzoo list '*po'
        kind, pattern = "algorithms", kind
    cards.show_list(kind, pattern or "*", imports, as_json, lines)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="of an algorithm, loss, modifier, credit or estimator; or 'training'")
    ],
    loss: Annotated[bool, typer.Option("--loss", help="the loss of that name, where an algorithm has it too")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="without what is proved, which is computed now")] = False,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """The card of one entry: its mathematics, its options, what it needs, and what is proved of it."""
    from prefzoo.cli import cards

    cards.show_card(name, loss, imports, as_json, quick)


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="losses, algorithms; all losses if none is given")
    ] = None,
    algorithm: Annotated[
        bool, typer.Option("--algorithm", help="names as algorithms, also those that losses have; all if none is given")
    ] = False,
    theory: Annotated[
        bool, typer.Option("--theory", help="what the theory laboratory finds, of any entry, instead of the contract")
    ] = False,
    settings: Settings = None,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Whether losses keep their contract (shapes, gradients, symmetries, extremes, options) and algorithms theirs: they
    are trained where every response can be enumerated, and end where they should. Exit code 1 if not.

    'prefzoo check my_loss --import my_file.py' checks a loss of yours; -s beta=0.5 checks one entry at other options.
    """
    from prefzoo.cli import check as checks

    if theory:
        kept = checks.show_theory(names or [], settings or [], imports, as_json)
    else:
        kept = checks.show_contract(names or [], settings or [], imports, as_json, algorithm)
    if not kept:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="of an algorithm or a loss; before the options")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="model folder, hub id, or 'tiny': small, with random weights")
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="file (JSON, CSV, Parquet, Arrow), folder or hub id; repeatable")
    ] = None,
    eval_dataset: Annotated[
        list[str] | None, typer.Option(help="rows or prompts to evaluate on (or --eval-split 0.05)")
    ] = None,
    columns: Columns = None,
    output_dir: Annotated[Path | None, typer.Option(help="new folder for the result (default: runs/NAME)")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="optimizer steps; rollout steps where samples are drawn")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="reward-model folder, verifier (exact, numeric), my_file.py:function, or judge(...), ensemble(...), "
            "gate(...), rules(...), steps(...); repeated: their sum"
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(help="model that is the anchor (default: the start model)")] = None,
    teacher: Annotated[str | None, typer.Option(help="model that is learned from (gkd, minillm, seqkd)")] = None,
    ptx_dataset: Annotated[str | None, typer.Option(help="demonstrations for ppo --ptx")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="ID", help="hub repository for the result")] = None,
    seed: Annotated[int | None, typer.Option(help="of everything that is random")] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="the same keys as here, with underscores; options win over it"),
    ] = None,
    from_trl: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="a configuration of a TRL trainer")] = None,
    settings: Settings = None,
    imports: Imports = [],  # noqa: B006
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on from the newest checkpoint of the folder; from the start without one"),
    ] = False,
    may_differ: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="what may differ from the run that is resumed: max_steps, versions"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, only the result")] = False,
) -> None:
    """Train a model; the result is an ordinary model folder, OUTPUT/final.

    Every option of the algorithm and of the training can be given as --key value: --beta 0.2 --learning-rate 1e-5.
    'prefzoo show NAME' lists them with their values.
    """
    from prefzoo.cli import training

    words = [*([] if name is None else [name]), *context.args]
    given = {
        "model": model, "dataset": dataset, "eval_dataset": eval_dataset, "columns": columns, "output_dir": output_dir,
        "max_steps": max_steps, "reward": reward, "reference": reference, "teacher": teacher,
        "ptx_dataset": ptx_dataset,
        "push_to_hub": push_to_hub, "seed": seed, "resume": resume or None, "may_differ": may_differ,
    }  # fmt: skip
    training.train(words, given, config, from_trl, settings or [], imports, quiet)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="algorithm of the dry run")] = None,
    model: Annotated[str | None, typer.Option(help="your model")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="your data")] = None,
    columns: Columns = None,
    reward: Annotated[list[str] | None, typer.Option(help="your reward")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="as for prefzoo train")] = None,
    from_trl: Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="as for prefzoo train")] = None,
    settings: Settings = None,
    imports: Imports = [],  # noqa: B006
) -> None:
    """What this machine has; and, with an algorithm, a model and data, two steps on eight rows before long work.

    Takes the options of 'prefzoo train'. Nothing is written.
    """
    from prefzoo.cli import doctor

    words = [*([] if name is None else [name]), *context.args]
    given = {"model": model, "dataset": dataset, "columns": columns, "reward": reward}
    doctor.examine(words, given, config, from_trl, settings or [], imports)


@app.command()
def data(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="file, folder or hub id; repeatable")],
    model: Annotated[str | None, typer.Option(help="model whose tokenizer reads it; none: text only")] = None,
    algorithm: Annotated[str | None, typer.Option("--for", metavar="NAME", help="as this algorithm reads it")] = None,
    examples: Annotated[int, typer.Option(min=0, help="rows to show")] = 3,
    columns: Columns = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="limit of prompt + completion, in tokens; 1024 if not given")
    ] = None,
    loss_on: Annotated[str | None, typer.Option(help="completion, assistant or all")] = None,
    implicit_prompt: Annotated[
        str, typer.Option(help="where pairs without prompt are split: word, or character as TRL does it")
    ] = "word",
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first faulty row")] = False,
) -> None:
    """What a data set is: its type, its faults, its lengths, and rows with the tokens that carry the loss."""
    from prefzoo.cli import data as shown

    shown.show_data(files, model, algorithm, examples, columns, max_length, loss_on, strict, implicit_prompt)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or folder of a reward model")],
    pairs: Annotated[list[str], typer.Argument(metavar="PAIRS", help="preference pairs that it was not trained on")],
    output: Annotated[Path | None, typer.Option(help="new folder for the calibrated model and its figure")] = None,
    columns: Columns = None,
    share: Annotated[
        float, typer.Option(help="of the prompts, to fit on; the others measure what came of it (1: all do both)")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="of that choice")] = 0,
    max_length: Annotated[int, typer.Option(min=1, help="limit of prompt + completion, in tokens")] = 1024,
    as_json: AsJson = False,
) -> None:
    """Fit the temperature of a reward model, so that the probabilities it gives are those that happen."""
    from prefzoo.cli import calibrate as command

    command.calibrate(model, pairs, output, columns, share, seed, max_length, as_json)


@app.command()
def judge(
    judge: Annotated[
        str,
        typer.Argument(
            metavar="JUDGE",
            help="length, a reward model's folder, a verifier, FILE.py:NAME, or '{llm: {model: FOLDER}}'",
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="pairs of answers that people have judged")],
    columns: Annotated[
        str | None,
        typer.Option(metavar="OURS=THEIRS,...", help="what the file calls prompt, a, b, label (several: label=x+y)"),
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="COLUMN", help="a line for each of its values too")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="for judges that read tokens: verifiers and functions")
    ] = None,
    cache: Annotated[str, typer.Option(metavar="FOLDER", help="verdicts of endpoints")] = ".prefzoo-judge",
    device: Annotated[str, typer.Option(help="of models")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """How good a judge is, against people: agreement, biases of place and length, verdicts that turn with the order."""
    from prefzoo.cli import judging

    judging.judge(judge, file, columns, by, tokenizer, cache, device, as_json)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or model folder, adapter, hub id")],
    prompt: Annotated[list[str] | None, typer.Option(help="a prompt; repeatable")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="a data set with prompts")] = None,
    columns: Columns = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help="write the answers there")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="answers per prompt")] = 1,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: NewTokens = 256,
    seed: Seed = 0,
    reward: Annotated[
        str | None, typer.Option(help="what chooses among answers (best_of_n): a folder, a verifier, FILE.py:NAME")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="by the weights alone, however the run answers")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answers of a model to prompts; without prompts they are read from standard input, one a line."""
    from prefzoo.cli import generation
    from prefzoo.rollout import Sampling

    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    generation.generate(
        model, prompt or [], prompts, columns, out, n, Sampling(temperature, top_p, max_new_tokens), seed, loading,
        reward, plain,
    )  # fmt: skip


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="run or model folder, adapter, hub id")],
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: NewTokens = 256,
    seed: Seed = 0,
    chat_template: Annotated[str | None, typer.Option(help="'chatml' or a Jinja file")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a model."""
    from prefzoo.cli import generation
    from prefzoo.rollout import Sampling

    loading = {"chat_template": chat_template, "revision": revision, "trust_remote_code": trust_remote_code}
    generation.chat(model, system, Sampling(temperature, top_p, max_new_tokens), seed, loading)


@app.command()
def bench(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="quick, preference, zoo, ... (prefzoo list suites), or FILE.yaml")
    ],
    data: Annotated[str | None, typer.Option(help="file, folder or hub id instead of the suite's data")] = None,
    algorithms: Annotated[str | None, typer.Option(metavar="A,B", help="only these, separated by commas")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="runs of each algorithm")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the results (default: runs/SUITE)")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("-s", "--set", metavar="KEY=VALUE", help="any value of the suite: start.model=FOLDER; repeatable"),
    ] = None,
    executor: Annotated[str, typer.Option(help="in-process, workers, ray (or ray:ADDRESS of a cluster)")] = "workers",
    workers: Annotated[int | None, typer.Option(min=1, help="processes (default: one per core)")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "cpu",
    imports: Imports = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done, and do nothing")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="print how many prompts and seeds a difference needs")] = False,
    points: Annotated[float, typer.Option(help="of --plan: the difference that matters, in points")] = 5.0,
    seed_sd: Annotated[
        float | None, typer.Option(help="of --plan: spread over seeds in points (default: as the folder's runs show)")
    ] = None,
) -> None:
    """Train several algorithms on the same data and compare them; what is already in the folder is not run again.

    After Ctrl-C, a kill or a failure the same command goes on where it was.
    """
    from prefzoo import benchmarks
    from prefzoo.cli import bench as command
    from prefzoo.cli.training import read_settings
    from prefzoo.training import Stopped

    chosen = None if algorithms is None else [a.strip() for a in algorithms.split(",") if a.strip()]
    folder = out or Path("runs") / Path(suite).stem
    asked: dict[str, Any] = {
        "algorithms": chosen,
        "seeds": seeds,
        "data": data,
        "changes": read_settings(settings or []),
    }
    if dry_run:
        return command.dry_run(suite, folder, workers, imports, **asked)
    if plan:
        return command.plan_study(suite, folder, points, seed_sd, imports, **asked)
    try:
        benchmarks.run(suite, out=folder, imports=imports, executor=executor, workers=workers, device=device, **asked)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        raise typer.Exit(stop.exit_code) from None


@app.command()
def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B ...", help="runs, model folders, adapters, hub ids, or files of answers"),
    ],
    judge: Annotated[
        list[str],
        typer.Option(
            metavar="JUDGE",
            help="reward-model folder, verifier, length, FILE.py:NAME, '{llm: {model: FOLDER}}', '{human: FILE}'; "
            "repeatable, the first decides",
        ),
    ],
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="what they answer; not needed with files of answers")
    ] = None,
    columns: Columns = None,
    names: Annotated[str | None, typer.Option(metavar="A,B,...", help="what to call them")] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="win rates are shown against it (default: the first)")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="answers per prompt (default: as many as files have, else 1)")
    ] = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: NewTokens = 256,
    seed: Seed = 0,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="of files, for functions that read tokens")
    ] = None,
    cache: Annotated[str, typer.Option(metavar="FOLDER", help="verdicts of endpoints")] = ".prefzoo-judge",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write results and the report there")] = None,
    export: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="write a blinded sheet for people to judge")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare models that exist already, or files of their answers, on the same prompts; it trains nothing.

    prefzoo compare runs/dpo runs/kto --prompts test.jsonl --judge my_reward_model --out comparison

    Every pair, both orders where a judge compares, one family of claims. Of these models, not of the methods that
    made them: that takes several seeds, and 'prefzoo bench'.
    """
    from prefzoo.cli import compare as command

    answering = {
        "samples": n, "temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens, "seed": seed,
        "baseline": baseline, "tokenizer": tokenizer, "cache": cache,
    }  # fmt: skip
    command.compare(models, judge, prompts, columns, names, answering, out, export, as_json)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="RUN1", help="folder of a run, its final/ or a checkpoint")],
    second: Annotated[str, typer.Argument(metavar="RUN2", help="another")],
    everything: Annotated[bool, typer.Option("--all", help="show differences without effect too")] = False,
    as_json: AsJson = False,
) -> None:
    """Why two runs differ: where their metrics part, how far their weights are, what they were given differently."""
    from prefzoo.cli import diff as shown

    shown.show_diff(first, second, everything, as_json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder that prefzoo bench wrote")],
    recompute: Annotated[bool, typer.Option("--recompute", help="every number again, from the stored rows")] = False,
) -> None:
    """Print the table of a finished comparison, and write its report.html, report.md and report.png again."""
    from prefzoo import benchmarks

    print(benchmarks.report(folder, recompute))
