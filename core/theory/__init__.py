"""The theory laboratory: what the papers claim of an entry, computed where every response can be enumerated.

A *theorem* is a function that takes the name of an entry and yields findings; ``@theorem("dpo", "cdpo")`` says of which
entries it speaks. Nothing here is sampled: expectations are sums over all responses, in float64.

>>> from prefzoo.theory import findings
>>> all(f.holds for f in findings("dpo"))
True
"""

from prefzoo.theory.base import THEOREMS, Finding, Theorem, findings, theorem

__all__ = ["THEOREMS", "Finding", "Theorem", "findings", "theorem"]
