"""Rules of TRL's fields about the model, the data, and what is sampled and rewarded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefzoo.registry import suggest
from prefzoo.spellings.trl.rules import Refusal, Rule, Translated, flag, listed, mapping, positive, real, show, text
from prefzoo.spellings.trl.rules_run import evaluates

# ---- the model


def dtype(out: Translated, name: str) -> None:
    kinds = ("float32", "bfloat16", "float16")
    kind = str(out.given[name]).removeprefix("torch.")
    if kind not in kinds:
        raise Refusal(f"name it: {', '.join(kinds)}{suggest(kind, kinds)}")
    out.set(name, "dtype", kind)


def revision(out: Translated, name: str) -> None:
    if out.given[name] in (None, "main"):
        return out.same(name)
    out.set(name, "revision", text(out.given[name]))


MODEL_KWARGS: dict[str, Rule] = {}  # filled below: the rules of the fields that model_init_kwargs may hold


def model_kwargs(out: Translated, name: str) -> None:
    for key, value in mapping(out.given[name] or {}).items():
        inner = Translated(out.algorithm, {key: value})
        if key not in MODEL_KWARGS:
            raise Refusal(f"{key} is not passed on{suggest(key, MODEL_KWARGS)} There are {', '.join(MODEL_KWARGS)}.")
        MODEL_KWARGS[key](inner, key)
        for _, why in inner.ignored:
            out.ignore(name, f"{key}: {why}")
        for _, _, why in inner.refused:
            raise Refusal(f"{key}: {why}")
        for ours, what in inner.settings.items():
            out.set(name, ours, what)
    if not out.given[name]:
        out.same(name)


def adapter(out: Translated, name: str) -> None:
    """``use_peft`` and what belongs to it."""
    value = out.given[name]
    if not out.get("use_peft", False):
        return out.same(name) if not value else out.ignore(name, "without use_peft")
    dora, rslora = out.get("use_dora", False), out.get("use_rslora", False)
    if dora and rslora:
        raise Refusal("use_dora and use_rslora together are not here; choose one.")
    if name in ("use_peft", "use_dora", "use_rslora"):
        out.set(name, "lora", "dora" if dora else "rslora" if rslora else True)
        if "lora_target_modules" not in out.given:
            out.notes.append("adapters are on all linear layers; TRL's default is a few of them: lora_target_modules.")
        if "lora_dropout" not in out.given:
            out.notes.append("adapters have no dropout; TRL's default is 0.05.")
    elif name == "lora_r":
        out.set(name, "lora_rank", positive(value))
    elif name == "lora_alpha":
        out.set(name, "lora_alpha", real(value))
    elif name == "lora_target_modules":
        names = [text(one) for one in listed(value)] or ["all-linear"]
        out.set(name, "lora_targets", "all-linear" if names == ["all-linear"] else tuple(names))
    elif name == "load_in_4bit":
        out.set(name, "load_in_4bit", flag(value))


def lora_dropout(out: Translated, name: str) -> None:
    if not out.get("use_peft", False):
        return out.ignore(name, "without use_peft")
    if out.given[name]:
        raise Refusal("adapters have no dropout here: two passes over the same tokens must agree; set it to 0.")
    out.same(name)


def four_bit(out: Translated, name: str) -> None:
    if out.given[name] and not out.get("use_peft", False):
        raise Refusal("a model in 4 bits is trained through an adapter; give use_peft too.")
    adapter(out, name)


# ---- the data


def data(out: Translated, name: str) -> None:
    """``dataset_name`` with its split and configuration, or ``datasets``, a mixture."""
    if out.get("datasets"):
        if name.startswith("dataset_"):
            return out.ignore(name, "datasets is given")
        return _mixture(out, name)
    if name in ("datasets", "test_split_size", "streaming"):
        return out.same(name) if not out.given[name] else out.ignore(name, "without datasets")
    path = out.get("dataset_name")
    if path is None:
        return out.ignore(name, "without dataset_name")
    if name == "dataset_streaming":
        return out.set(name, "streaming", flag(out.given[name]))
    if name == "dataset_test_split" or (name == "dataset_name" and evaluates(out)):
        if not evaluates(out):
            return out.ignore(name, "without eval_strategy nothing is evaluated")
        held_out = _source(text(path), out.get("dataset_config"), out.get("dataset_test_split", "test"))
        out.put(out.arguments, name, "eval_dataset", held_out)
    if name != "dataset_test_split":
        split = out.get("dataset_train_split")
        out.put(out.arguments, name, "dataset", _source(text(path), out.get("dataset_config"), split))


def _source(path: str, name: Any, split: Any) -> str | dict[str, Any]:
    """A plain path, or a mapping with the keys of ``prefzoo.data.DataSource``."""
    found = {"path": path, "name": name, "split": split}
    return path if name is None and split is None else {k: v for k, v in found.items() if v is not None}


BUILDERS = ("json", "csv", "parquet", "text", "arrow")  # of the datasets library: the files are in data_files
SOURCE_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def _mixture(out: Translated, name: str) -> None:
    if name == "streaming":
        return out.set(name, "streaming", flag(out.given[name]))
    if name == "test_split_size":
        share = real(out.given[name])
        if share is None:
            return out.same(name)
        if not 0 < share < 1:
            raise Refusal("expected a share between 0 and 1.")
        return out.set(name, "eval_split", share)
    if evaluates(out) and out.get("test_split_size") is None:
        raise Refusal("eval_strategy needs rows that are held out: give test_split_size.")
    sources = [_mixed(out, one) for one in listed(out.given[name])]
    weights = [isinstance(s, dict) and "weight" in s for s in sources]
    if any(weights) and not all(weights):
        raise Refusal("give fraction for all of the data sets, or for none.")
    if any(weights):
        out.notes.append("fractions: rows are drawn by seed; TRL takes the first ones of each data set.")
    out.put(out.arguments, name, "dataset", sources[0] if len(sources) == 1 else sources)


def _mixed(out: Translated, given: Any) -> str | dict[str, Any]:
    if not isinstance(given, Mapping) or not isinstance(given.get("path"), str):
        raise Refusal(f"expected a list of mappings with a path, got {show(given)}.")
    for key in given:
        if key not in SOURCE_KEYS:
            raise Refusal(f"a data set has no key {key!r}{suggest(key, SOURCE_KEYS)}")
    path, files = given["path"], given.get("data_files")
    if given.get("data_dir") is not None:
        raise Refusal(f"data_dir is not passed on; give the folder as the path of {path!r}.")
    if files is not None:
        files = files[0] if isinstance(files, list) and len(files) == 1 else files
        if not isinstance(files, str) or path not in BUILDERS:
            raise Refusal("data_files is one file, with path json, csv or parquet; give each file as a data set.")
        path = files
    if given.get("columns"):
        out.notes.append(f"columns of {path!r}: all are kept; what a row is follows from their names.")
    source = _source(path, given.get("name"), given.get("split") if files is None else None)
    fraction = real(given.get("fraction"))
    if fraction is None:
        return source
    return {**(source if isinstance(source, dict) else {"path": source}), "weight": fraction}


def text_field(out: Translated, name: str) -> None:
    if out.given[name] == "text":
        return out.same(name)
    out.set(name, "columns", {"text": text(out.given[name])})


def loss_on(out: Translated, name: str) -> None:
    """``completion_only_loss`` and ``assistant_only_loss``."""
    if out.get("assistant_only_loss", False):
        return out.set(name, "loss_on", "assistant")
    completions = out.get("completion_only_loss")
    if completions is None:
        return out.same(name)
    out.set(name, "loss_on", "completion" if flag(completions) else "all")


def template(out: Translated, name: str) -> None:
    path = out.given[name]
    if path is None:
        return out.same(name)
    if not str(path).endswith((".jinja", ".jinja2")):
        raise Refusal("expected a Jinja file; of another model's tokenizer, save the template to a file first.")
    out.set(name, "chat_template", path)


# ---- GRPO


def completions_shown(out: Translated, name: str) -> None:
    if name == "num_completions_to_print" and not out.get("log_completions", False):
        return out.ignore(name, "without log_completions")
    count = positive(out.get("num_completions_to_print", 3)) if out.get("log_completions", False) else 0
    out.set(name, "log_completions", count)


SHIPPED = {  # TRL's reward functions that are here under the same mathematics
    "think_format_reward": "think_format_reward",
    "get_soft_overlong_punishment": "get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)",
}
NOT_SHIPPED = ("accuracy_reward", "reasoning_accuracy_reward")


def rewards(out: Translated, name: str) -> None:
    """``reward_model_name_or_path`` and ``reward_funcs``: the model first, as in TRL's script."""
    model = out.get("reward_model_name_or_path")
    if name == "reward_model_name_or_path" and (model is None or out.get("reward_funcs")):
        return out.mapped.append((name, "reward", text(model))) if model is not None else out.same(name)
    found = [*([] if model is None else [text(model)]), *(_reward(text(f)) for f in listed(out.get("reward_funcs")))]
    if not found:
        return out.same(name)
    out.put(out.arguments, name, "reward", found[0] if len(found) == 1 else found)


def _reward(name: str) -> str:
    if name in SHIPPED:
        return SHIPPED[name]
    if name in NOT_SHIPPED:
        raise Refusal(f"{name} reads LaTeX with a package of its own; nearest here is 'numeric', the last number.")
    module, _, function = name.rpartition(".")
    if not module:
        near = suggest(name, [*SHIPPED, *NOT_SHIPPED])
        raise Refusal(f"{name!r} is no reward function of TRL's{near} Yours is my_module.function.")
    return f"{module.replace('.', '/')}.py:{function}"


def vllm(out: Translated, name: str) -> None:
    if out.get("use_vllm", False):
        return out.ignore(name, "of use_vllm, which is refused")
    out.ignore(name, "without use_vllm")


def entropy(out: Translated, name: str) -> None:
    if out.get("use_adaptive_entropy", False):
        return out.ignore(name, "of use_adaptive_entropy, which is refused")
    out.ignore(name, "without use_adaptive_entropy")
