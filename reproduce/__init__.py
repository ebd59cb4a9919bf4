"""Experiments and commands, each run by `python -m reproduce.NAME`, from any folder."""

import sys
from importlib import import_module
from pathlib import Path

# `python -m` looks in the current folder first, where a user's data.py would be taken for ours.
_HOME = str(Path(__file__).parents[1])
sys.path.insert(0, _HOME)
try:
    for _name in ("common", "data", "papers"):
        import_module(_name)
finally:
    sys.path.remove(_HOME)
