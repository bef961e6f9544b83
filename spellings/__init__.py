"""prefzoo.spellings: our algorithms under other libraries' names, options and defaults. One folder per library."""

if __name__ != "prefzoo.spellings":
    raise ImportError(
        "import prefzoo.spellings, not spellings: this folder is a part of the package 'prefzoo' (pip install -e .)"
    )

from prefzoo.spellings import trl

__all__ = ["trl"]
