"""A hook of MkDocs: one page per algorithm and loss, the card that ``prefzoo show NAME`` prints."""

from typing import Any

from mkdocs.structure.files import File, Files

from prefzoo.algorithm import ALGORITHMS
from prefzoo.cli.cards import algorithm_facts, card_page, loss_facts, training_page
from prefzoo.losses import LOSSES


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "training-options.md", content=training_page()))
    for name in [*ALGORITHMS.names(), *ALGORITHMS.names("*:*")]:
        page = card_page(algorithm_facts(name, whole=True))
        files.append(File.generated(config, f"cards/{name.replace(':', '-')}.md", content=page))
    for name in LOSSES.names():
        page = card_page(loss_facts(name, whole=True))
        files.append(File.generated(config, f"cards/losses/{name}.md", content=page))
    return files
