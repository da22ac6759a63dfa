"""Stand-ins for what OpenRLHF imports and a test on a CPU does not run: mocks, of packages that are not installed.

Its tests load single files under names of their own; the files whose functions an integration replaces become the package's
own modules here, without and with us, so that the tests run what a trainer would run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

ABSENT = (
    "deepspeed",
    "flash_attn",
    "ray",
    "vllm",
    "pylatexenc",
    "aiohttp",
    "torchdata",
    "loralib",
    "jsonlines",
    "wandb",
)


class _Mocks:
    names = tuple(name for name in ABSENT if importlib.util.find_spec(name) is None)

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec):
        made = MagicMock(name=spec.name)
        made.__name__, made.__spec__, made.__path__ = spec.name, spec, []
        if spec.name == "flash_attn.ops":  # asked whether it is there; it is not
            raise ImportError(spec.name)
        return made

    def exec_module(self, module):
        pass


class _Own:
    """Loads a module of the package in place of its file."""

    def __init__(self, name):
        self.name = name

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        own = importlib.import_module(self.name)
        module.__dict__.update({key: value for key, value in vars(own).items() if not key.startswith("__")})


_spec_from_file_location = importlib.util.spec_from_file_location


def spec_from_file_location(name, location=None, **rest):
    at = Path(location).parts[-3:] if location is not None else ()
    if at[:2] == ("openrlhf", "models") and at[2] in ("loss.py", "utils.py"):
        return ModuleSpec(name, _Own(f"openrlhf.models.{at[2][:-3]}"), origin=str(location))
    return _spec_from_file_location(name, location, **rest)


def pytest_configure(config):
    sys.meta_path.append(_Mocks())
    importlib.util.spec_from_file_location = spec_from_file_location


@contextmanager
def mocked():
    """Imports inside find mocks of what is absent; afterwards it is absent again, for others who look whether it is there."""
    finder = _Mocks()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in finder.names]:
            del sys.modules[name]
