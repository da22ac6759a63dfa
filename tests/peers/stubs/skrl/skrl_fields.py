"""For skrl's own tests only. They are of its 2.0, whose configurations have two fields that 2.1 dropped and its tests leave at
0: they are put back, and nothing reads them."""

import dataclasses
import importlib

FIELDS = [(name, int, dataclasses.field(default=0)) for name in ("random_timesteps", "learning_starts")]

for agent in ("a2c", "amp", "ppo", "rpo", "trpo"):
    module = importlib.import_module(f"skrl.agents.torch.{agent}.{agent}")
    package = importlib.import_module(f"skrl.agents.torch.{agent}")
    name = f"{agent.upper()}_CFG"
    theirs = getattr(module, name)
    missing = [x for x in FIELDS if x[0] not in theirs.__dataclass_fields__]
    wider = dataclasses.make_dataclass(name, missing, bases=(theirs,), kw_only=True)
    for where in (module, package):
        setattr(where, name, wider)
