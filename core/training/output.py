"""What a run leaves behind: its folder, its model card, its learning curves; and the way to the hub."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from prefzoo.parts.product import FILE as DECODE
from prefzoo.registry import UsageError
from prefzoo.training import checkpoint
from prefzoo.training.metrics import LOGS
from prefzoo.training.record import RECORD

MODELS = ("final", "best")


def check_folder(output_dir: str | Path | None, resume: bool) -> None:
    """Refuse a folder that holds another run, before anything is loaded."""
    if output_dir is None:
        if resume:
            raise UsageError("resume needs output_dir: the checkpoints are there.")
        return
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output folder {str(folder)!r} is a file; choose another name.")
    outer = folder.resolve().parent
    if read_record(outer) is not None and folder.resolve() in (*(outer / m for m in MODELS), *checkpoint.found(outer)):
        raise UsageError(
            f"output folder {str(folder)!r} is part of the run in {str(folder.parent)!r}: give that one, with resume, "
            f"to go on with it; or model={str(folder)!r} and a new folder, to start from its weights."
        )
    others = checkpoint.foreign(folder)
    if others:
        raise UsageError(
            f"output folder {str(folder)!r}: {others[0].name} in it was not written by us and could be lost; choose "
            "a new folder."
        )
    record, begun = read_record(folder), bool(checkpoint.found(folder))
    if record is None and (folder / RECORD).exists():
        raise UsageError(
            f"output folder {str(folder)!r}: {RECORD} in it was not written by a run, and would be lost; choose a new "
            "folder."
        )
    if resume and (record is not None or begun):
        if record is not None and record.get("finished") and not (folder / "final").is_dir():
            raise UsageError(
                f"the run in {str(folder)!r} is finished, but its final/ is not there: bring it back, or choose a new "
                "folder."
            )
        return
    if record is not None and record["finished"]:
        cure = "choose a new folder or remove it" + (", or make it longer (--resume, more max_steps)" if begun else "")
        raise UsageError(f"output folder {str(folder)!r} holds another run, which is finished; {cure}.")
    if begun or (record is not None and (folder / "best").exists()):
        raise UsageError(
            f"output folder {str(folder)!r} holds another run, which has not come to its end; go on with it "
            "(resume=True, --resume), choose a new folder or remove it."
        )
    if any((folder / name).exists() for name in MODELS):
        raise UsageError(f"output folder {str(folder)!r} holds another run; choose a new folder or remove it.")
    for name in LOGS:
        if (folder / name).exists() and not _is_log(folder / name):
            raise UsageError(
                f"output folder {str(folder)!r}: {name} in it was not written by a run, and would be lost; "
                "choose a new folder."
            )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record that a run has left in its folder; None: there is none, or it is somebody else's."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(record, dict) and {"config", "data", "composition"} <= record.keys()
    return {"finished": "spent" in record, **record} if ours else None


def _is_log(file: Path) -> bool:
    """Whether every line is of a run: an object with the number of its step. A killed run cuts its last line off."""
    try:
        *lines, last = file.read_text(encoding="utf-8", errors="replace").split("\n")
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return False
    begins = '{"step": '
    return all(isinstance(row, dict) and "step" in row for row in rows) and last[: len(begins)] == begins[: len(last)]


def make_folder(output_dir: str | Path | None) -> Path | None:
    if output_dir is None:
        return None
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"output folder {str(folder)!r} cannot be written to: {error.strerror}.") from error
    return folder


# ------------------------------------------------------------------------------------------------ model card


def write_card(record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """``README.md`` of the model: how it was made, in words and numbers, from the run's record alone."""
    text = card(record, history, adapter=_is_adapter(folder), decoder=(folder / DECODE).exists())
    (folder / "README.md").write_text(text, encoding="utf-8")


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def card(
    record: Mapping[str, Any], history: Sequence[Mapping[str, Any]], adapter: bool = False, decoder: bool = False
) -> str:
    """The text of a model card."""
    name, base = record["algorithm"], record["model"]
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        base_model=base if _on_hub(base) else None,
        tags=["prefzoo", name, "preference-optimization"],
        pipeline_tag="text-generation" if _is_policy(record) else "text-classification",
    )
    spent, config = record["spent"], record["config"]
    last = {k: v for row in history for k, v in row.items()}
    shown = {k: v for k, v in last.items() if isinstance(v, float) and k not in ("time", "epoch")}
    lines = [
        "---", data.to_yaml().strip(), "---", "",
        f"# {name} from {base}", "",
        f"Trained by prefzoo {record['versions']['prefzoo']} with the algorithm "
        f"`{name}`: this page was written by the run from its own record.", "",
        "## How it was made", "",
        "| | |", "|---|---|",
        f"| start | `{base}`{_revision(config)} |",
        f"| algorithm | `{record['composition']}` |",
        *_optional("reference", record["reference"]),
        *_optional("reward", record["reward"]),
        *([f"| data | {_data_words(record['data'])} |"] if record["data"] else []),
        *([f"| held out | {_data_words(record['held_out'])} |"] if record["held_out"] else []),
        f"| options | {_code(record['options'])} |",
        f"| training | {_code({k: v for k, v in config.items() if k in record['given'] or k in _ALWAYS})} |",
        f"| cost | {spent['optimizer_steps']} optimizer steps, {spent['trained_tokens']:,} trained tokens, "
        f"{spent['generated_tokens']:,} sampled tokens, {spent['reward_calls']:,} rewards, {spent['seconds']:.0f} s |",
        f"| formula | {_code(record['sources'])} (hashes of the source files) |",
        f"| versions | {_code(record['versions'])} |",
        "",
        "## Last numbers", "", "| metric | value |", "|---|---|", *(f"| {k} | {v:.4g} |" for k, v in shown.items()), "",
    ]  # fmt: skip
    if record["best"]:
        best = record["best"]
        lines += [f"Best evaluation: {best['metric']} = {best['value']:.4g} after step {best['step']}.", ""]
    if decoder:
        lines += [
            "## Use", "",
            f"The answers of this algorithm are more than samples of the weights: `{DECODE}` says how they are made. "
            "prefzoo obeys it; what loads the weights alone, as below, does not.", "",
            "```python", "import prefzoo", "", 'answers = prefzoo.generate("FOLDER", ["..."])', "```", "",
            "The weights alone:", "",
        ]  # fmt: skip
    return "\n".join([*lines, *([] if decoder else ["## Use", ""]), "```python", *_usage(record, adapter), "```", ""])


_ALWAYS = ("learning_rate", "rows_per_step", "epochs", "max_steps", "optimizer", "precision", "max_length", "seed")


def _usage(record: Mapping[str, Any], adapter: bool) -> list[str]:
    if not _is_policy(record):
        return ["from prefzoo.models.load import load_scorer", "", 'reward_model = load_scorer("FOLDER")']
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    return [
        *(imports if adapter else ["from transformers import AutoModelForCausalLM, AutoTokenizer"]), "",
        f'model = {kind}.from_pretrained("FOLDER")', 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]  # fmt: skip


def _is_policy(record: Mapping[str, Any]) -> bool:
    return "->reward" not in record["composition"]


def _on_hub(base: Any) -> bool:
    return isinstance(base, str) and base.count("/") == 1 and not Path(base).exists()


def _revision(config: Mapping[str, Any]) -> str:
    return f" at revision `{config['revision']}`" if config["revision"] else ""


def _optional(name: str, value: Any) -> list[str]:
    return [] if value is None else [f"| {name} | `{value}` |"]


def _data_words(data: Mapping[str, Any]) -> str:
    left_out = "".join(f"; {n} dropped: {reason}" for reason, n in data["dropped"].items())
    return f"`{data['source']}`, {data['rows']:,} rows of type {data['type']}, content hash `{data['hash']}`{left_out}"


def _code(values: Mapping[str, Any]) -> str:
    return ", ".join(f"`{k}={v}`" for k, v in values.items()) or "–"


# ------------------------------------------------------------------------------------------- learning curves

PANELS = {  # title -> names it may show, first those of the run, then their evaluations
    "loss": ("loss", "loss/critic"),
    "reward": ("reward", "reward_std"),
    "implicit rewards": ("rewards/chosen", "rewards/rejected", "rewards/margins"),
    "accuracy": ("rewards/accuracies", "accuracy"),
    "KL to the reference": ("kl",),
    "log-probabilities": ("logps/chosen", "logps/rejected"),
    "completion length": ("completions/mean_length",),
    "gradient norm": ("grad_norm", "grad_norm/critic"),
}


def draw_curves(history: Sequence[Mapping[str, Any]], file: Path, title: str, note: Callable[[str], None]) -> None:
    """Learning curves as PNG: a panel for each kind of metric the run has, evaluations dashed."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no global state
    except ImportError:
        note("no curves.png: matplotlib is not installed.")
        return
    have = {name for row in history for name in row}
    places = _in_a_row([row["step"] for row in history])
    panels = {t: [n for n in names if {n, f"eval/{n}"} & have] for t, names in PANELS.items()}
    panels = {t: names for t, names in panels.items() if names}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, panels.items(), strict=False):
        for color, name in enumerate(names):
            for prefix, style in (("", "-"), ("eval/", "--")):
                points = [(x, r[prefix + name]) for x, r in zip(places, history, strict=True) if prefix + name in r]
                if points:
                    label = name if not prefix or name not in have else None
                    marker = "o" if len(points) < 30 else None
                    axis.plot(*zip(*points, strict=True), style, color=f"C{color}", marker=marker, ms=3, label=label)
        axis.ticklabel_format(axis="y", useOffset=False)
        axis.set_title(panel, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    evaluated = any(name.startswith("eval/") for name in have)
    figure.suptitle(title + (" (dashed: evaluation)" if evaluated else ""), fontsize=11)
    figure.savefig(file, dpi=130)


def _in_a_row(steps: Sequence[int]) -> list[int]:
    """Steps that begin anew with each stage, counted on.

    >>> _in_a_row([0, 1, 2, 0, 1])
    [0, 1, 2, 2, 3]
    """
    places, before, last = list[int](), 0, 0
    for step in steps:
        before += last if step < last else 0
        last = step
        places.append(before + step)
    return places


# ------------------------------------------------------------------------------------------------- the hub


def push(folder: Path, repository: str, note: Callable[[str], None]) -> None:
    """Upload a finished model. The folder stays, so a failure costs nothing but the upload."""
    try:
        api = HfApi()
        url = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="model trained by prefzoo")
    except Exception as error:  # network, rights, quota: many classes, one cure
        raise UsageError(
            f"push_to_hub {repository!r} failed ({str(error).strip().splitlines()[0]}). The model is in {folder}; "
            f"upload it later with: hf upload {repository} {folder}"
        ) from error
    note(f"pushed to {url}")
