"""How a judge is written: one word, or a kind with its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from prefzoo.feedback.judges import CRITERION
from prefzoo.feedback.templates import FOLDER
from prefzoo.feedback.verifiers import VERIFIERS
from prefzoo.registry import UsageError, suggest
from prefzoo.source import content_hash

Kind = Literal["gold", "exact", "reward_model", "held_out", "verifier", "rule", "llm", "annotators", "human"]
ALONE = ("gold", "exact", "reward_model", "held_out")  # kinds that may stand without a value
WITH = ("reward_model", "verifier", "rule", "llm", "annotators", "human")
RULES = ("length", "brevity")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Llm(_Section):
    """A language model as a judge, asked in both orders: a folder or hub id, or a name at an endpoint."""

    model: str
    endpoint: str | None = Field(None, description="OpenAI-compatible address, such as http://localhost:8000")
    template: str = Field("pair", description="pair, pair_reasoned, or a text file with {prompt}, {first}, {second}")
    criterion: str = CRITERION
    logprobs: bool = False
    max_tokens: PositiveInt = 1024
    # What changes no verdict, and so is no part of a judgement's key.
    key_env: str = "OPENAI_API_KEY"
    timeout: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0)
    concurrency: PositiveInt = 8
    max_calls: PositiveInt | None = Field(None, description="of the whole suite, as max_cost is")
    max_cost: float | None = Field(None, gt=0, description="stop when so much is spent; needs the price")
    price_per_million: tuple[float, float] | None = Field(None, description="of prompt tokens, of completion tokens")

    @model_validator(mode="after")
    def _fits(self) -> Llm:
        if self.max_cost is not None and self.price_per_million is None:
            raise ValueError("max_cost needs price_per_million: [of prompt tokens, of completion tokens]")
        if self.endpoint is None and self.max_cost is not None:
            raise ValueError("max_cost is for an endpoint; a local model costs nothing")
        if self.endpoint is None and self.template == "pair_reasoned":
            raise ValueError("template 'pair_reasoned' gives reasons first, which only an endpoint's text has")
        return self


class Annotator(_Section):
    """A simulated annotator of a world, or a language model."""

    bias: Literal["flattery", "length", "none"] = "none"
    strength: float | None = None
    temperature: float | None = Field(None, ge=0)
    llm: Llm | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"bias": value} if isinstance(value, str) else value


class Annotators(_Section):
    """A pool, of which one is drawn for each comparison; a share of the labels is turned round (AlpacaFarm)."""

    pool: tuple[Annotator, ...] = Field(min_length=1)
    noise: float = Field(0.25, ge=0, le=0.5)
    seed: int = 0


class JudgeSpec(_Section):
    """A judge of a suite: ``gold``, ``{verifier: numeric}``, ``{llm: {endpoint: ..., model: ...}}``, ...

    >>> JudgeSpec.model_validate("gold").builtin, JudgeSpec.model_validate({"verifier": "numeric"}).name
    (True, 'numeric')
    """

    kind: Kind
    value: str | Llm | Annotators | None = None
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _written(cls, given: Any) -> Any:
        if isinstance(given, JudgeSpec):
            return given
        if isinstance(given, str):
            given = {given: None}
        if not isinstance(given, Mapping) or "kind" in given:
            return given
        named = {"name": given["name"]} if given.get("name") else {}
        kinds = [k for k in given if k != "name"]
        known = list(dict.fromkeys((*ALONE, *WITH)))
        if len(kinds) != 1:
            raise ValueError(f"a judge is one of {', '.join(known)} with its options; got {list(given)}")
        [kind] = kinds
        if kind not in known:
            near = suggest(str(kind), [*known, *RULES, *VERIFIERS.names()])
            raise ValueError(f"no judge {kind!r}{near} There are {', '.join(known)}; reward_model alone is the proxy")
        value = given[kind]
        if value is None and kind not in ALONE:
            raise ValueError(f"the judge {kind!r} needs a value, such as {{{kind}: {EXAMPLES[kind]}}}")
        return {"kind": kind, "value": _typed(kind, value), **named}

    @model_validator(mode="after")
    def _fits(self) -> JudgeSpec:
        if not self.name:
            object.__setattr__(self, "name", self._default_name())
        if self.kind == "rule" and str(self.value) not in RULES and not _is_file(self.value):
            raise ValueError(
                f"rule {self.value!r}{suggest(str(self.value), RULES)} Give {', '.join(RULES)}, a YAML file of rules, "
                "or FILE.py:function"
            )
        if self.kind == "human" and not Path(str(self.value)).exists():
            raise ValueError(f"human judgements {self.value!r}: no such file")
        return self

    @classmethod
    def parse(cls, text: str) -> JudgeSpec:
        """A judge as a command line names it: also a verifier's name, a reward model's folder, FILE.py:function."""
        found = yaml.safe_load(text)
        if isinstance(found, str) and found not in ALONE:
            if found in VERIFIERS:
                found = {"verifier": found}
            elif found in RULES or found.partition(":")[0].endswith((".py", ".yaml", ".yml")):
                found = {"rule": found}
            elif Path(found).is_dir():
                found = {"reward_model": found}
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            words = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
            raise UsageError(f"judge {text!r}: {place + ': ' if place else ''}{words}.") from None

    @property
    def builtin(self) -> bool:
        """Whether every cell has its column anyway."""
        return self.kind in ("gold", "exact") or (self.kind == "reward_model" and self.value is None)

    @property
    def pairs(self) -> bool:
        """Whether it compares two answers instead of scoring one."""
        return self.kind in ("llm", "annotators", "human")

    @property
    def worldly(self) -> bool:
        """Whether it needs the truth of an embedded world."""
        pool = self.value.pool if isinstance(self.value, Annotators) else ()
        return self.kind in ("gold", "exact") or any(a.llm is None for a in pool)

    @property
    def needs(self) -> tuple[str, ...]:
        """Artifacts of the suite that it reads."""
        return (self.kind,) if self.kind in ("reward_model", "held_out") and self.value is None else ()

    def sources(self) -> dict[str, str]:
        """The content of the files that it reads, for the key of its judgements."""
        names = [self.value] if isinstance(self.value, str) else []
        pool = self.value.pool if isinstance(self.value, Annotators) else ()
        llms = [v for v in (self.value, *(a.llm for a in pool)) if isinstance(v, Llm)]
        names += [n for one in llms for n in (one.template, one.model)]
        files = {n: Path(n.partition(":")[0] if ".py:" in n else n) for n in names}
        files |= {n: ours for n in names if (ours := FOLDER / f"{n}.txt").exists()}
        return {str(n): content_hash(p) for n, p in files.items() if p.exists()}

    def in_key(self) -> dict[str, Any]:
        """What its judgements depend on: not how an endpoint is reached."""
        found = self.model_dump(mode="json")
        value = found["value"]
        asked = (
            [value] if self.kind == "llm" else [a["llm"] for a in value["pool"]] if self.kind == "annotators" else []
        )
        for llm in filter(None, asked):
            for name in ("key_env", "timeout", "retries", "concurrency", "max_calls", "max_cost", "price_per_million"):
                del llm[name]
        return found

    def _default_name(self) -> str:
        if self.kind == "reward_model":
            return "proxy" if self.value is None else Path(str(self.value)).name
        if isinstance(self.value, Llm):
            return Path(self.value.model).name
        if self.kind in ("verifier", "rule"):
            return str(self.value).rpartition(":")[2].partition("(")[0]
        return Path(str(self.value)).stem if self.kind == "human" else self.kind


EXAMPLES = {
    "verifier": "numeric", "rule": "length", "llm": "{model: FOLDER}", "annotators": "{pool: [flattery]}",
    "human": "FILE.csv",
}  # fmt: skip


def _typed(kind: str, value: Any) -> Any:
    """The value of a kind, checked as what it is: a union would tell each mistake several times."""
    sections: dict[str, type[_Section]] = {"llm": Llm, "annotators": Annotators}
    if kind in sections:
        if not isinstance(value, Mapping | _Section):
            raise ValueError(f"{kind}: expected options such as {EXAMPLES[kind]}, got {value!r:.60}")
        if isinstance(value, Mapping):
            for key in value:
                if key not in sections[kind].model_fields:
                    known = sections[kind].model_fields
                    raise ValueError(f"{kind}: no key {key!r}{suggest(str(key), known)} Known: {', '.join(known)}")
            return sections[kind].model_validate(value)
        return value
    if value is not None and not isinstance(value, str | Path):
        raise ValueError(f"{kind}: expected a name or a file, got {value!r:.60}")
    return None if value is None else str(value)


def _is_file(value: Any) -> bool:
    file = Path(str(value).partition(":")[0])
    return file.suffix in (".py", ".yaml", ".yml") and file.exists()
