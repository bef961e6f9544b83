"""prefzoo.algos: the compositions. One short file per algorithm; importing this package registers them all."""

if __name__ != "prefzoo.algos":
    raise ImportError(
        "import prefzoo.algos, not algos: this folder is a part of the package 'prefzoo' (pip install -e .)"
    )

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
