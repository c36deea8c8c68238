"""To be told of imports."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
from typing import Any, Callable, Optional


class Finder(importlib.abc.MetaPathFinder):
    """`told(module)` of each module for whose name `wanted` holds, once it has been imported."""

    def __init__(self, wanted: Callable[[str], bool], told: Callable[[Any], None]):
        self._wanted = wanted
        self._told = told
        self._busy = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if self._busy or not self._wanted(name):
            return None
        self._busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy = False
        if spec and spec.loader:
            spec.loader = _Loader(spec.loader, self._told)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any, told: Callable[[Any], None]):
        self._loader = loader
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self._loader
        self._told(module)
