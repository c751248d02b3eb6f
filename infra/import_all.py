"""Import every module of the installed package; run outside the checkout, so that nothing else is found."""

import importlib
import importlib.metadata
import sys

files = importlib.metadata.files("saex-pipe") or []
modules = [str(f).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for f in files if f.suffix == ".py"]
for module in modules:
    importlib.import_module(module)
print(f"{len(modules)} modules of {importlib.metadata.version('saex-pipe')} import on Python {sys.version.split()[0]}")
assert len(modules) > 50, "the wheel lacks modules"
assert "torch" not in sys.modules, "torch must never be imported"
