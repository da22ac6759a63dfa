"""A stub: serving, logging and cluster packages that NeMo-RL imports on its way to its losses, and that no test here uses.

Each is a module of empty classes.
"""

import importlib.abc
import importlib.machinery
import sys
import types
import typing

import typing_extensions

STUBBED = {
    "aiohttp", "datasets", "fastapi", "mlflow", "prometheus_client", "pynvml", "scipy", "soundfile", "swanlab", "tensorboard",
    "torchdata", "uvicorn", "vllm", "wandb", "zmq",
}  # fmt: skip


class Anything(type):
    """A class of which every attribute is such a class again."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})


class Empty(types.ModuleType):
    __path__ = ()
    __version__ = "99.0"

    def __getattr__(self, name):
        return getattr(Anything("", (), {}), name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in STUBBED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Finder())
typing.TypedDict = typing_extensions.TypedDict  # pydantic asks for it below Python 3.12, which NeMo-RL is written for
