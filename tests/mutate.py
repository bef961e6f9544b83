"""The mutation test: one small fault at a time in a loss, a credit function or an estimator; a proof must fail.

``python tests/mutate.py`` breaks every function of ``losses/`` by every operator, and prints which faults the contract,
the theory laboratory, the golden cases or the relations catch, and each that none of them does. It exits with 1 where
less than 95 % of the faults in losses are caught. Those that change nothing are listed with the reason, ``EQUIVALENT``;
faults in what is only logged are counted apart.

The tests are collected once. Every mutant is a forked process that exchanges the code of one function and runs the
tests that reach the changed statement, cheapest first, up to the first that fails.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import fnmatch
import functools
import importlib
import inspect
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import pytest
import torch
from _pytest.runner import runtestprotocol

from prefzoo import records
from prefzoo.records import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
NOT_MATHEMATICS = ("__init__", "base", "catalogue")  # the registries
FILES = [file for file in sorted((ROOT / "losses").glob("*.py")) if file.stem not in NOT_MATHEMATICS]
SHARE = 0.95

# Mutants that compute the same, and why.
EQUIVALENT: dict[str, str] = {
    (
        "advantages:_centred:off_by_one: total_B > 0 → total_B > 1"
    ): "weights are counts: where their sum is 1 the divisor is 1",
    (
        "advantages:group_relative:clip_side: (size_B - int(sample)).clamp(min=1) → size_B - int(sample)"
    ): "0 / 0 only where the difference is 0, for which _over has 0",
    (
        "advantages:_std:clip_side: size.clamp(min=1) → size"
    ): "0 / 0 where no number is known: every numerator of _over is then 0",
    (
        "advantages:_std:off_by_one: size.clamp(min=1) → size.clamp(min=2)"
    ): "of one number: every numerator of _over is then 0",
    (
        "advantages:_std:clip_side: (size - int(sample)).clamp(min=1) → size - int(sample)"
    ): "of one number or none: every numerator of _over is then 0",
    "advantages:gdpo:drop_stop_gradient: @torch.no_grad() → ": "group_relative, of which it is a sum, has no gradient",
    (
        "advantages:gae:clip_side: size_BS.gather(1, index_BT).clamp(min=1) → size_BS.gather(1, index_BT)"
    ): "0 / 0 in rows without tokens, which the mask clears",
    "advantages:whiten:clip_side: size.clamp(min=1) → size": "0 / 0 of no tokens, which the mask clears",
    "advantages:best_of_k:drop_stop_gradient: @torch.no_grad() → ": "indices have no gradient",
    "advantages:top_against_bottom:drop_stop_gradient: @torch.no_grad() → ": "indices have no gradient",
    "advantages:returns_to_go:drop_stop_gradient: @torch.no_grad() → ": "gae has no gradient",
    (
        "advantages:returns_to_go:off_by_one: gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, "
        "gamma=gamma, lam=1.0)[0] → gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=gamma, "
        "lam=1.0)[1]"
    ): "where values are 0 the advantage is the return",
    "advantages:reinforce_pp:drop_stop_gradient: @torch.no_grad() → ": "whiten has no gradient",
    "advantages:reinforce_pp_baseline:drop_stop_gradient: @torch.no_grad() → ": "reinforce_pp has no gradient",
    (
        "kl:_straight_through:drop_stop_gradient: (logps - ref_logps).detach() → logps - ref_logps"
    ): "its gradient is multiplied by an exact 0",
    (
        "likelihood:dft:clip_side: safe_exp(masked(batch.logps_BT, batch.mask_BT).detach()) → "
        "masked(batch.logps_BT, batch.mask_BT).detach().exp()"
    ): "the log of a probability is at most 0",
    "likelihood:exponential_weight:drop_stop_gradient: values.detach() → values": "whoever calls it has detached them",
    (
        "likelihood:_scores:drop_stop_gradient: batch.scores_B.detach() → batch.scores_B"
    ): "exponential_weight detaches; a comparison has no gradient",
    (
        "likelihood:_advantages:drop_stop_gradient: batch.advantages_BT.detach() → batch.advantages_BT"
    ): "exponential_weight detaches",
    (
        "modifiers:pair_weight:swap_sides: torch.zeros_like(batch.chosen_B) → torch.zeros_like(batch.rejected_B)"
    ): "both sides have the same shape",
    (
        "modifiers:pair_weight:clip_side: safe_exp(log_weight_B) → log_weight_B.exp()"
    ): "p / Σ p² is at most the size of the vocabulary",
    (
        "modifiers:length_desensitised:drop_mask: masked(logps_BT, mask_BT) → logps_BT"
    ): "the sums of the record mask again",
    "offline:ilql_v:drop_stop_gradient: error_BT.detach() < 0 → error_BT < 0": "a comparison has no gradient",
    (
        "policy_gradient:cispo:clip_side: safe_exp(log_ratio_BT.detach()) → log_ratio_BT.detach().exp()"
    ): "the clip bounds it",
    (
        "policy_modifiers:_above_sampler:drop_stop_gradient: (logps_BT - sampling_logps_BT).detach() → "
        "logps_BT - sampling_logps_BT"
    ): "read under no_grad, and by a comparison",
    "policy_modifiers:importance_weights:drop_stop_gradient: @torch.no_grad() → ": "_above_sampler detaches",
    (
        "policy_modifiers:importance_weights:clip_side: safe_exp(log_weight_BT) → log_weight_BT.exp()"
    ): "the bound on the weight bounds it",
    (
        "policy_modifiers:off_policy_mask:sum_for_mean: masked_sum(batch.advantages_BT.detach(), "
        "batch.mask_BT) → masked_mean(batch.advantages_BT.detach(), batch.mask_BT)"
    ): "of a sum and of a mean the sign is the same",
    (
        "policy_modifiers:off_policy_mask:drop_stop_gradient: batch.advantages_BT.detach() → batch.advantages_BT"
    ): "a comparison has no gradient",
    (
        "policy_modifiers:high_entropy:drop_stop_gradient: batch.entropy_BT.detach() → batch.entropy_BT"
    ): "a comparison has no gradient",
    (
        "policy_modifiers:high_entropy:drop_stop_gradient: masked(batch.entropy_BT.detach(), batch.mask_BT) "
        ">= batch.entropy_floor.detach() → masked(batch.entropy_BT.detach(), batch.mask_BT) >= "
        "batch.entropy_floor"
    ): "a comparison has no gradient",
    (
        "policy_modifiers:high_entropy:drop_mask: masked(batch.entropy_BT.detach(), batch.mask_BT) >= "
        "batch.entropy_floor.detach() → batch.entropy_BT.detach() >= batch.entropy_floor.detach()"
    ): "outside the mask the loss is 0, kept or not",
    (
        "policy_sequence:sequence_surrogate:drop_mask: masked_sum(log_ratios(batch), batch.mask_BT) → "
        "log_ratios(batch).sum(-1)"
    ): "log_ratios has masked",
    (
        "ranked:scores_of:drop_mask: masked(batch.scores_PK.detach(), batch.valid_PK) → batch.scores_PK.detach()"
    ): "log_softmax_PK and lambda_weights mask them",
    (
        "ranked:best_takes_all:clip_side: (valid_PK.sum(-1, keepdim=True) - 1).clamp(min=1) → "
        "valid_PK.sum(-1, keepdim=True) - 1"
    ): "/ 0 where nobody is the rest, which of_lists masks",
    (
        "ranked:best_takes_all:drop_factor: torch.where(first_PK, 1 - share, share / rest_P1.to(dtype)) * "
        "valid_PK → torch.where(first_PK, 1 - share, share / rest_P1.to(dtype))"
    ): "of_lists masks",
    (
        "ranked:nca:clip_side: valid_PK.sum(-1, keepdim=True).clamp(min=1) → valid_PK.sum(-1, keepdim=True)"
    ): "/ 0 in a list of nobody, which of_lists masks",
    (
        "ranked:nca:off_by_one: valid_PK.sum(-1, keepdim=True).clamp(min=1) → valid_PK.sum(-1, "
        "keepdim=True).clamp(min=2)"
    ): "of_lists masks lists of one",
    "ranked:exo:drop_mask: torch.where(valid_PK, target_PK, 1.0) → target_PK": "of_lists masks",
    "ranked:lambda_weights:drop_stop_gradient: @torch.no_grad() → ": "the scores are detached, ranks have no gradient",
    "ranked:lambda_weights:drop_mask: masked(scores_PK, valid_PK) → scores_PK": "both_PKK masks",
    (
        "rankings:log_softmax_PK:drop_mask: masked(x_PK.log_softmax(-1), valid_PK) → x_PK.log_softmax(-1)"
    ): "of_lists masks",
    (
        "reward:first_is_better:swap_sides: torch.ones_like(batch.chosen_B) → torch.ones_like(batch.rejected_B)"
    ): "both sides have the same shape",
    "pairwise:pair_metrics:drop_stop_gradient: @torch.no_grad() → ": "reward_metrics detaches",
    (
        "pairwise:reward_metrics:swap_sides: (chosen_B > rejected_B).to(chosen_B.dtype) → (chosen_B > "
        "rejected_B).to(rejected_B.dtype)"
    ): "both sides have the same type",
    (
        "policy_gradient:ratio_metrics:drop_stop_gradient: clip_ratio.detach() → clip_ratio"
    ): "under no_grad, and a comparison",
    "policy_gradient:ratio_metrics:drop_stop_gradient: log_ratio_BT.detach() → log_ratio_BT": "under no_grad",
    "reward:ranked_reward_metrics:drop_stop_gradient: @torch.no_grad() → ": "the rewards are detached",
    "reward:ranked_reward_metrics:drop_stop_gradient: batch.rewards_PK.detach() → batch.rewards_PK": "under no_grad",
    "reward:process_reward:drop_stop_gradient: scores_BT.detach() → scores_BT": "under no_grad",
    (
        "advantages:whiten:clip_side: (size - int(unbiased)).clamp(min=1) → size - int(unbiased)"
    ): "0 / 0 of one token, for whose difference of 0 _over has 0",
    (
        "rankings:plackett_luce_P:drop_mask: masked(-F.logsigmoid(-behind_PKK.logsumexp(-1)), below.any(-1)) "
        "→ -F.logsigmoid(-behind_PKK.logsumexp(-1))"
    ): "where nobody is behind, logsigmoid of the largest number is 0",
}


# ------------------------------------------------------------------------------------------------------ the operators

Found = Iterator[ast.expr]


def flip_sign(node: ast.AST, here: Place) -> Found:
    """-x becomes x, a + b becomes a - b and the other way round; so does "not" of a mask."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert) and here.role != "axis":
        yield node.operand
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield ast.BinOp(node.left, ast.Sub() if isinstance(node.op, ast.Add) else ast.Add(), node.right)


def drop_factor(node: ast.AST, here: Place) -> Found:
    """a * b becomes a, and b; a / b and a ** b become a."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div | ast.FloorDiv | ast.Pow):
        yield node.left
        if isinstance(node.op, ast.Mult):
            yield node.right


SIDES = [
    ("chosen", "rejected"), ("win", "lose"), ("best", "worst"), ("q1", "q2"), ("policy", "reference"),
    ("first", "second"), ("forward", "reverse"), ("pos", "neg"), ("desirable", "undesirable"),
]  # fmt: skip
OTHER = {a: b for pair in SIDES for a, b in (pair, pair[::-1])}
ORDERED = ("kl_of", "k3", "value", "lerp")  # functions of two like arguments


FIELDS = {name for family in FAMILIES for name in (*dir(family), *family.__annotations__)}


def other_side(name: str) -> str | None:
    """The name of the same thing on the other side."""
    words = [OTHER.get(word, word) for word in name.split("_")]
    return "_".join(words) if words != name.split("_") else None


def swap_sides(node: ast.AST, here: Place) -> Found:
    """chosen becomes rejected, in fields, local names and strings; two like arguments are exchanged."""
    if isinstance(node, ast.Attribute) and (other := other_side(node.attr)) in FIELDS:
        yield ast.Attribute(node.value, other or "", ast.Load())
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        if (other := other_side(node.id)) in here.names:
            yield ast.Name(other or "", ast.Load())
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (other := other_side(node.value)):
        yield ast.Constant(other)
    elif isinstance(node, ast.Call) and len(node.args) >= 2:
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ORDERED or isinstance(node.func, ast.Call):
            yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)


def sum_for_mean(node: ast.AST, here: Place) -> Found:
    """A sum becomes a mean, a mean a sum."""
    names = {"masked_sum": "masked_mean", "masked_mean": "masked_sum"}
    if isinstance(node, ast.Name) and node.id in names:
        yield ast.Name(names[node.id], ast.Load())
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr == "mean":
            yield ast.Call(ast.Attribute(node.func.value, "sum", ast.Load()), node.args, node.keywords)
        elif node.func.attr == "sum":  # of truth values and integers too
            yield ast.Call(ast.Name("mean_of", ast.Load()), [node.func.value, *node.args], node.keywords)


def drop_mask(node: ast.AST, here: Place) -> Found:
    """masked(x, m) becomes x, a sum over a mask one over all, a choice between two always the one or the other."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        yield from (node.left, node.right) if "metrics" not in ast.unparse(node) else ()  # dictionaries
    if not isinstance(node, ast.Call):
        return
    called = ast.unparse(node.func)
    if called == "masked":
        yield node.args[0]
    elif called in ("masked_sum", "masked_mean"):
        reduce = ast.Attribute(node.args[0], called.removeprefix("masked_"), ast.Load())
        yield ast.Call(reduce, [ast.Constant(-1)], [])
    elif called == "torch.where":
        yield from (arm for arm in node.args[1:] if not is_number(arm))
    elif called.endswith((".masked_fill", ".nan_to_num")):
        yield node.func.value  # type: ignore[attr-defined]
    elif called == "by_case":
        for arm in node.args[1:3]:
            yield ast.Call(node.func, [node.args[0], arm, arm, node.args[3]], [])


def is_number(node: ast.AST) -> bool:
    return isinstance(node.operand if isinstance(node, ast.UnaryOp) else node, ast.Constant)


def drop_stop_gradient(node: ast.AST, here: Place) -> Found:
    """x.detach() becomes x. ``torch.no_grad`` above a function goes with ``NO_GRAD``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "detach":
        yield node.func.value


EXTREMES = {"minimum": "maximum", "min": "max", "amin": "amax"}
EXTREMES |= {b: a for a, b in EXTREMES.items()}
COMPARED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}


def clip_side(node: ast.AST, here: Place) -> Found:
    """min becomes max, clamp(min) clamp(max); a bound goes; < becomes >, == becomes !=; a sort turns round."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
        yield ast.Compare(node.left, [COMPARED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.Constant) and node.value in ("amin", "amax"):
        yield ast.Constant(EXTREMES[node.value])
    if not isinstance(node, ast.Call):
        return
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if called in EXTREMES:
        new, old = EXTREMES[called], node.func
        function = (
            ast.Attribute(old.value, new, ast.Load()) if isinstance(old, ast.Attribute) else ast.Name(new, ast.Load())
        )
        yield ast.Call(function, node.args, node.keywords)
    elif called == "clamp":
        if len(node.args) == 2:
            for nothing in (0, 1):
                bounds = [ast.Constant(None) if i == nothing else bound for i, bound in enumerate(node.args)]
                if not all(isinstance(b, ast.Constant) and b.value is None for b in bounds):
                    yield ast.Call(node.func, bounds, [])
        else:
            yield node.func.value  # type: ignore[attr-defined]
            turned = [ast.keyword({"min": "max", "max": "min"}[k.arg or ""], k.value) for k in node.keywords]
            yield ast.Call(node.func, [], turned)
    elif called in ("relu", "bounded", "int"):
        yield node.args[0]
    elif called == "safe_exp":
        yield ast.Call(ast.Attribute(node.args[0], "exp", ast.Load()), [], [])
    if any(keyword.arg == "descending" for keyword in node.keywords):
        yield ast.Call(node.func, node.args, [keyword for keyword in node.keywords if keyword.arg != "descending"])


def off_by_one(node: ast.AST, here: Place) -> Found:
    """An index, the end of a slice or of a range, a count or a bound is one more; what is added or subtracted also
    one less."""
    if not (isinstance(node, ast.Constant) and type(node.value) is int):
        return
    if here.role in ("index", "bound", "compared", "summand"):
        yield ast.Constant(node.value + 1)
    if here.role == "summand" and node.value == 1:
        yield ast.Constant(0)


OPERATORS: dict[str, Callable[[ast.AST, Place], Found]] = {
    f.__name__: f
    for f in (flip_sign, drop_factor, swap_sides, sum_for_mean, drop_mask, drop_stop_gradient, clip_side, off_by_one)
}


def mean_of(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The mean, of truth values and integers as well."""
    return (values if values.is_floating_point() else values.to(torch.float32)).mean(*args, **kwargs)


# -------------------------------------------------------------------------------------------------------- the mutants


@dataclass(frozen=True)
class Place:
    """Where an expression stands: what a number is there, and the names of the function."""

    role: str
    names: frozenset[str]


@dataclass(frozen=True)
class Mutant:
    """One fault: the node below ``parent`` is another."""

    name: str
    line: int
    before: str
    after: str
    logged: bool = False  # whether it changes only what is logged
    statement: int = 0  # the line where the statement begins
    hole: Hole | None = field(default=None, repr=False, compare=False)  # None: the decorator goes
    node: ast.expr | None = field(default=None, repr=False, compare=False)

    @property
    def file(self) -> str:
        return self.name.split(":")[0]

    @property
    def function(self) -> str:
        return self.name.split(":")[1]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.function}"

    @property
    def key(self) -> str:
        """What it is, whatever else is in the function."""
        return f"{self.place}:{self.operator}: {self.before} → {self.after}"

    @property
    def operator(self) -> str:
        return self.name.split(":")[2]

    @property
    def words(self) -> str:
        return f"{self.name}  line {self.line}:  {self.before}  →  {self.after}"


@dataclass(frozen=True)
class Hole:
    """An expression in the tree, which can be taken out and another put in."""

    parent: ast.AST
    name: str
    index: int | None
    node: ast.expr
    around: ast.expr | None  # the call, sum or comparison that it stands in
    role: str
    statement: int

    def fill(self, node: ast.expr) -> None:
        if self.index is None:
            setattr(self.parent, self.name, node)
        else:
            getattr(self.parent, self.name)[self.index] = node

    @contextlib.contextmanager
    def filled(self, node: ast.expr) -> Iterator[None]:
        """The tree with another expression here, for a while."""
        self.fill(ast.fix_missing_locations(ast.copy_location(node, self.node)))
        try:
            yield
        finally:
            self.fill(self.node)

    def shown(self, node: ast.expr) -> str:
        """The expression; a name or a number with what stands around it."""
        with self.filled(node):
            short = isinstance(self.node, ast.Name | ast.Constant | ast.Attribute)
            short |= isinstance(self.around, ast.Compare)
            return ast.unparse(self.around if short and self.around is not None else node)


NO_GRAD = "@torch.no_grad()"
NO_CODE = ("annotation", "args", "decorator_list", "returns", "targets", "target")  # of a function or an assignment
Function = ast.FunctionDef


@dataclass
class Source:
    """A file of losses as a tree, and what can be broken in it."""

    name: str
    tree: ast.Module

    @classmethod
    def of(cls, text: str, name: str) -> Source:
        return cls(name, ast.parse(text))

    def functions(self) -> Iterator[tuple[str, Function]]:
        """Those of the module and of its classes, by qualified name."""
        for node in self.tree.body:
            if isinstance(node, Function):
                yield node.name, node
            elif isinstance(node, ast.ClassDef):
                yield from ((f"{node.name}.{f.name}", f) for f in node.body if isinstance(f, Function))

    def mutants(self) -> Iterator[Mutant]:
        for qualname, function in self.functions():
            counts: Counter[str] = Counter()
            only_logged = logged_nodes(function)
            everything = function.name.endswith("_metrics") or function.name in ("accuracy_P", "rest_mean_P")
            if any(ast.unparse(d) == NO_GRAD[1:] for d in function.decorator_list):
                name = f"{self.name}:{qualname}:drop_stop_gradient:0"
                first = function.body[1 if ast.get_docstring(function) else 0].lineno
                yield Mutant(name, function.lineno, NO_GRAD, "", everything, first)
            names = frozenset(n.id for n in ast.walk(function) if isinstance(n, ast.Name)) | {
                a.arg for a in ast.walk(function) if isinstance(a, ast.arg)
            }
            for hole in holes(function):
                for operator, find in OPERATORS.items():
                    for new in find(hole.node, Place(hole.role, names)):
                        if ast.unparse(new) == ast.unparse(hole.node):
                            continue
                        before, after = hole.shown(hole.node), hole.shown(new)
                        counts[operator] += 1
                        name = f"{self.name}:{qualname}:{operator}:{counts[operator]}"
                        logged = everything or id(hole.node) in only_logged
                        line = hole.node.lineno
                        yield Mutant(name, line, before, after, logged, hole.statement, hole, new)

    def code(self, qualname: str, mutant: Mutant | None = None) -> CodeType:
        """The code of a function, with the fault in it if one is given."""
        if mutant is None or mutant.hole is None or mutant.node is None:
            return find_code(compile(self.tree, self.name, "exec", dont_inherit=True), qualname)
        with mutant.hole.filled(mutant.node):
            return self.code(qualname)


def find_code(code: CodeType, qualname: str) -> CodeType:
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    for c in inner:
        if c.co_qualname == qualname:
            return c
        if qualname.startswith(c.co_qualname + "."):
            return find_code(c, qualname)
    raise LookupError(qualname)


def refuses(node: ast.AST) -> bool:
    """Whether a statement only raises: an option refused is no mathematics."""
    if isinstance(node, ast.If):
        return isinstance(node.body[-1], ast.Raise) and not node.orelse
    return isinstance(node, ast.Raise | ast.Assert)


def holes(function: Function) -> Iterator[Hole]:
    """Every expression of the body that may be broken."""

    def below(parent: ast.AST, around: ast.expr | None, role: str, statement: int) -> Iterator[Hole]:
        for name, value in ast.iter_fields(parent):
            if name in NO_CODE and not isinstance(parent, ast.Call):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or refuses(child) or is_text(parent, child):
                    continue
                here = role_of(parent, name, role)
                line = child.lineno if isinstance(child, ast.stmt) else statement
                if isinstance(child, ast.expr) and not isinstance(getattr(child, "ctx", None), ast.Store):
                    yield Hole(parent, name, index, child, around, here, line)
                inner = isinstance(child, ast.Call | ast.BinOp | ast.Compare | ast.Subscript)
                yield from below(child, child if inner else around, here, line)

    yield from below(function, None, "", function.lineno)


def is_text(parent: ast.AST, child: ast.AST) -> bool:
    """A docstring, or the parts of a formatted string."""
    if isinstance(parent, ast.Expr) and isinstance(child, ast.Constant):
        return True
    return isinstance(parent, ast.JoinedStr)


ALONG = (
    "sum", "mean", "cumsum", "flip", "gather", "logsumexp", "log_softmax", "argsort", "sort", "amax", "any", "all",
    "unbind", "stack", "cat", "masked_sum",
)  # fmt: skip


def role_of(parent: ast.AST, name: str, role: str) -> str:
    """What a number is in this place: an index, something added, a bound, something compared."""
    if isinstance(parent, ast.Subscript):
        of_axes = isinstance(parent.value, ast.Attribute) and parent.value.attr == "shape"
        return "" if name != "slice" else "axis" if of_axes else "index"
    if isinstance(parent, ast.Tuple | ast.UnaryOp | ast.Slice):
        return role
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Add | ast.Sub):
        return "summand"
    if isinstance(parent, ast.Compare):
        return "compared"
    if isinstance(parent, ast.keyword):
        return {"min": "bound", "max": "bound", "dim": "axis"}.get(parent.arg or "", "")
    if isinstance(parent, ast.Call) and name == "args":
        called = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return "index" if called in ("range", "triu") else "axis" if called in ALONG else ""
    return ""


def logged_nodes(function: Function) -> set[int]:
    """The nodes that reach nothing but the metrics of a ``LossOut``."""
    inside: set[int] = set()

    def take(node: ast.AST) -> None:
        inside.update(id(n) for n in ast.walk(node))

    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LossOut":
            for argument in node.args[1:]:
                take(argument)
    while True:  # an assignment whose names are read only there
        before = len(inside)
        read = {
            n.id
            for n in ast.walk(function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in inside
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and id(node) not in inside:
                names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
                if names and not names & read:
                    take(node)
        if len(inside) == before:
            return inside


# ------------------------------------------------------------------------------------------------- to break a function


def function_of(file: str, qualname: str) -> tuple[Any, FunctionType]:
    """The function of the module as others hold it, and the one inside whose code is run."""
    held: Any = importlib.import_module(f"prefzoo.losses.{file}")
    for part in qualname.split("."):
        held = vars(held)[part]
    if isinstance(held, property):
        held = held.fget
    inner = inspect.unwrap(getattr(held, "__func__", held))
    assert isinstance(inner, FunctionType)
    return held, inner


def break_it(source: Source, mutant: Mutant) -> None:
    """Put the fault into the running process. Whoever holds the function holds the broken one."""
    held, inner = function_of(source.name, mutant.function)
    if mutant.hole is None:
        cells = dict(zip(held.__code__.co_freevars, held.__closure__, strict=True))
        cells["ctx_factory"].cell_contents = contextlib.nullcontext
        return
    inner.__globals__.setdefault("mean_of", mean_of)
    for name in ("masked_sum", "masked_mean"):
        inner.__globals__.setdefault(name, getattr(records, name))
    inner.__code__ = source.code(mutant.function, mutant)


class Told(ast.NodeTransformer):
    """Puts a call before every statement of a function, which tells that it was reached."""

    def visit(self, node: ast.AST) -> Any:
        self.generic_visit(node)
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if isinstance(block, list) and isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef):
                told = [(ast.parse(f"reached({s.lineno})").body[0], s) for s in block]
                setattr(node, name, [s for pair in told for s in pair])
        return node


def listen(source: Source, reached: set[tuple[str, int]]) -> None:
    """From now on every function of the file says which of its statements run."""
    told = ast.fix_missing_locations(Told().visit(copy.deepcopy(source.tree)))
    module = compile(told, source.name, "exec", dont_inherit=True)
    for qualname, _ in source.functions():
        _, inner = function_of(source.name, qualname)
        inner.__globals__["reached"] = functools.partial(tell, reached, source.name)
        inner.__code__ = find_code(module, qualname)


def tell(reached: set[tuple[str, int]], file: str, line: int) -> None:
    reached.add((file, line))


# -------------------------------------------------------------------------------------------------------- the proofs

KINDS = ("contract", "theory", "golden", "relations", "time")


def kind_of(test: str) -> str:
    """What sort of proof a test is, by its name."""
    if "contract" in test.split("::")[-1]:
        return "contract"
    return "theory" if "/theory/" in test else "golden" if "/test_golden_" in test else "relations"


@dataclass
class Proofs:
    """The collected tests: how long each takes, and which statements it reaches."""

    items: list[pytest.Item]
    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, set[tuple[str, int]]] = field(default_factory=dict)
    killers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def of(self, mutant: Mutant) -> list[pytest.Item]:
        """Those that reach the changed statement: what caught other faults of the function, then the cheapest.

        Parameters of one test are much alike: each further one counts as dearer.
        """
        found = [item for item in self.items if (mutant.file, mutant.statement) in self.reached[item.nodeid]]
        alike: Counter[str] = Counter()
        cost = {}
        for item in sorted(found, key=lambda i: self.seconds[i.nodeid]):
            test = item.nodeid.split("[")[0]
            alike[test] += 1
            cost[item.nodeid] = self.seconds[item.nodeid] * alike[test]
        before = self.killers[mutant.place]
        return sorted(found, key=lambda i: (-before[i.nodeid], cost[i.nodeid]))

    def measure(self, sources: list[Source], jobs: int) -> list[str]:
        """Run every test once; returns those that fail without any fault."""
        modules = sorted({item.nodeid.split("::")[0] for item in self.items})
        parts = [[i for i in self.items if modules.index(i.nodeid.split("::")[0]) % jobs == job] for job in range(jobs)]
        failed = []
        for _, said in forks([functools.partial(measured, part, sources) for part in parts], jobs):
            for test, (seconds, reached, passed) in json.loads(said or "{}").items():
                self.seconds[test], self.reached[test] = seconds, {(file, line) for file, line in reached}
                failed += [] if passed else [test]
        return failed or [item.nodeid for item in self.items if item.nodeid not in self.seconds]


def measured(items: list[pytest.Item], sources: list[Source]) -> str:
    reached: set[tuple[str, int]] = set()
    for source in sources:
        listen(source, reached)
    found = {}
    for item, following in followed(items):
        reached.clear()
        start = time.perf_counter()
        passed = passes(item, following)
        found[item.nodeid] = (time.perf_counter() - start, sorted(reached), passed)
    return json.dumps(found)


def followed(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Each with the next, for which pytest keeps what both need."""
    following = [*items[1:], None] if items else []
    return zip(items, following, strict=True)


def passes(item: pytest.Item, following: pytest.Item | None) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=following))


def first_failure(source: Source, mutant: Mutant, items: list[pytest.Item], seconds: dict[str, float]) -> str:
    """The test that catches it; "" if none does."""
    break_it(source, mutant)
    for item, following in followed(items):
        signal.setitimer(signal.ITIMER_REAL, 10 + 30 * seconds[item.nodeid])  # it ends the process
        if not passes(item, following):
            return item.nodeid
    return ""


def forks(work: Iterable[Callable[[], str]], jobs: int) -> Iterator[tuple[int, str | None]]:
    """Do each piece of work in a process of its own, so many at a time: its number, and what it said or None if killed.

    This process computes nothing and has one thread: a child is as good as a new process.
    """
    running: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as folder:

        def ended() -> tuple[int, str | None]:
            pid, status = os.wait()
            number = running.pop(pid)
            if os.WIFSIGNALED(status):
                return number, None
            return number, Path(folder, str(number)).read_text()

        for number, do in enumerate(work):
            if len(running) == jobs:
                yield ended()
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    said = do()
                    Path(folder, str(number)).write_text(said)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[pid] = number
        while running:
            yield ended()


# ----------------------------------------------------------------------------------------------------------- the table


@dataclass
class Row:
    """A line of the table."""

    mutants: int = 0
    caught: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        return sum(self.caught.values()) / self.mutants if self.mutants else 1.0


def table(title: str, rows: dict[str, Row]) -> str:
    lines = [f"{title:24}" + "".join(f"{h:>11}" for h in ("mutants", *KINDS, "survived", "share"))]
    for name, row in rows.items():
        cells = [row.mutants, *(row.caught[k] for k in KINDS), row.mutants - sum(row.caught.values())]
        lines.append(f"{name:24}" + "".join(f"{c:11}" for c in cells) + f"{row.share:11.1%}")
    return "\n".join(lines)


def report(mutants: list[Mutant], by: dict[str, str | None]) -> tuple[str, float]:
    """The tables and the survivors, and the share of the faults that are caught; those of metrics apart."""
    parts, of_losses = [], Row()
    for title, logged in (("losses and credit", False), ("what is logged", True)):
        rows: dict[str, dict[str, Row]] = {"operator": defaultdict(Row), "file": defaultdict(Row)}
        whole = Row()
        for mutant in mutants:
            if mutant.logged != logged or mutant.name not in by:
                continue
            test = by[mutant.name]
            kind = "time" if test is None else kind_of(test) if test else ""
            for row in (rows["operator"][mutant.operator], rows["file"][mutant.file], whole):
                row.mutants += 1
                row.caught.update([kind] if kind else [])
        if not whole.mutants:
            continue
        parts += [f"== {title}", table("operator", rows["operator"]), table("file", rows["file"] | {"all": whole})]
        survivors = [m.words for m in mutants if m.logged == logged and by.get(m.name) == ""]
        parts += ["survivors:", *survivors] if survivors else []
        of_losses = of_losses if logged else whole
    return "\n".join(parts), of_losses.share


# ------------------------------------------------------------------------------------------------------------- running


def all_sources() -> list[Source]:
    return [Source.of(file.read_text(), file.stem) for file in FILES]


def check_equivalents(mutants: list[Mutant]) -> None:
    """What is excused is still a mutant."""
    stale = EQUIVALENT.keys() - {m.key for m in mutants}
    if stale:
        raise SystemExit("no mutants any more, so take them out of EQUIVALENT:\n" + "\n".join(sorted(stale)))


class Mutation:
    """The pytest plug-in that breaks and runs instead of running."""

    def __init__(self, sources: list[Source], mutants: list[Mutant], given: argparse.Namespace) -> None:
        self.sources, self.mutants, self.given = {s.name: s for s in sources}, mutants, given
        self.by: dict[str, str | None] = {}
        self.failed: list[str] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        proofs, start = Proofs(session.items), time.monotonic()
        broken = {m.file for m in self.mutants}
        self.failed = proofs.measure([self.sources[name] for name in sorted(broken)], self.given.jobs)
        if self.failed:
            return True
        print(
            f"\n{len(session.items)} tests in {time.monotonic() - start:.0f} s; {len(self.mutants)} mutants", flush=True
        )

        def work() -> Iterator[Callable[[], str]]:
            for m in self.mutants:
                yield functools.partial(first_failure, self.sources[m.file], m, proofs.of(m), proofs.seconds)

        for number, test in forks(work(), self.given.jobs):
            mutant = self.mutants[number]
            self.by[mutant.name] = test
            proofs.killers[mutant.place].update([test] if test else [])
            verdict = "time" if test is None else test.removeprefix("tests/") if test else "SURVIVED"
            print(f"{len(self.by):5} {time.monotonic() - start:6.0f} s  {mutant.words}  |  {verdict}", flush=True)
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=["tests/losses", "tests/theory"], help="as pytest takes them")
    parser.add_argument("--only", nargs="*", default=["*"], help="names or patterns: pairwise:dpo:*")
    parser.add_argument("--sample", type=int, help="so many, drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="the mutants, none is run")
    parser.add_argument("--equivalent", action="store_true", help="run those of EQUIVALENT: none may be caught")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sources = all_sources()
    mutants = [m for source in sources for m in source.mutants()]
    check_equivalents(mutants)
    mutants = [m for m in mutants if (m.key in EQUIVALENT) == given.equivalent]
    mutants = [m for m in mutants if any(fnmatch.fnmatch(m.name, pattern) for pattern in given.only)]
    if given.sample:
        chosen = {m.name for m in random.Random(given.seed).sample(mutants, min(given.sample, len(mutants)))}
        mutants = [m for m in mutants if m.name in chosen]
    if given.list:
        print("\n".join(("logged  " if m.logged else "        ") + m.words for m in mutants))
        return 0
    mutation = Mutation(sources, mutants, given)
    pytest.main([*given.tests, "-q", "-s", "-p", "no:cacheprovider", "-p", "no:warnings"], plugins=[mutation])
    if mutation.failed or len(mutation.by) < len(mutants):
        print("these fail without a fault:", *mutation.failed, sep="\n")
        return 1
    words, share = report(mutants, mutation.by)
    print(words)
    if given.equivalent:
        return 1 if any(test != "" for test in mutation.by.values()) else 0
    excused = [m for source in sources for m in source.mutants() if m.key in EQUIVALENT]
    reasons = [f"{m.words}:  {EQUIVALENT[m.key]}" for m in excused]
    print(f"equivalent, not counted: {len(reasons)}", *reasons, sep="\n")
    print(f"{share:.1%} caught")
    return 0 if share >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
