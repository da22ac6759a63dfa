"""What every integration shares, on a trainer made here: checks before, restoration after, one line for each misuse."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import types
from importlib import metadata

import pytest

from ppo_fast.integrations import TRAINERS, _seam


@pytest.fixture
def trainer(monkeypatch):
    """A package with a function, a class, and a module that imports the function by name."""
    module, importer = types.ModuleType("a_trainer"), types.ModuleType("a_trainer.loop")
    source = """
        def returns(rewards, *, gamma=0.99):
            return "theirs"

        class PPO:
            def train(self, batch):
                return "theirs"

            @staticmethod
            def helper(x):
                return "theirs"

        class Child(PPO):
            pass

        LOSSES = {"vanilla": returns}
    """
    exec(textwrap.dedent(source), module.__dict__)
    importer.returns = module.returns
    monkeypatch.setitem(sys.modules, "a_trainer", module)
    monkeypatch.setitem(sys.modules, "a_trainer.loop", importer)
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.4.2" if name == "a-trainer" else version(name))
    return module


def ours(*args, **kwargs):
    return "ours"


def integration(name="a", **changes):
    seams = {
        "a_trainer:returns": ("rewards, *, gamma", ("a_trainer.loop",)),
        "a_trainer:PPO.train": ("self, batch", ()),
        "a_trainer:PPO.helper": ("x", ()),
        "a_trainer:Child.train": (("self", "self, batch"), ()),
    }
    seams.update(changes.pop("seams", {}))
    made = [
        _seam.Seam(where, staticmethod(ours) if where.endswith("helper") else ours, *rest)
        for where, rest in seams.items()
    ]
    return _seam.Integration(name, "a-trainer", changes.get("at_least", "1.2"), changes.get("below", "2"), made)


def answers(trainer):
    loop = sys.modules["a_trainer.loop"]
    return [
        trainer.returns(1),
        loop.returns(1),
        trainer.PPO().train(1),
        trainer.PPO.helper(1),
        trainer.Child().train(1),
    ]


def everything(trainer):
    loop = sys.modules["a_trainer.loop"]
    return [dict(vars(x)) for x in (trainer, loop, trainer.PPO, trainer.Child)]


def test_enable_replaces_and_disable_restores_exactly(trainer):
    before, a = everything(trainer), integration()
    assert answers(trainer) == ["theirs"] * 5
    a.enable()
    assert a.is_enabled and answers(trainer) == ["ours"] * 5
    a.disable()
    assert not a.is_enabled and answers(trainer) == ["theirs"] * 5
    assert everything(trainer) == before  # the same objects; what was inherited is inherited again


def test_an_item_of_a_registry(trainer):
    a = integration(seams={"a_trainer:LOSSES[vanilla]": ("rewards, *, gamma", ())})
    theirs = dict(trainer.LOSSES)
    with a.enabled():
        assert {"vanilla": ours} == trainer.LOSSES and trainer.returns(1) == "ours"
        with pytest.raises(RuntimeError, match=r"LOSSES\[vanilla\] is held by ppo_fast.integrations.a"):
            _seam.Integration("b", "a-trainer", "1.2", "2", [_seam.Seam("a_trainer:LOSSES[vanilla]", ours)]).enable()
    assert theirs == trainer.LOSSES
    with a.enabled():
        trainer.LOSSES["vanilla"] = other = lambda rewards: "others"
        with pytest.warns(UserWarning, match="a registry.vanilla was replaced by others"):
            a.disable()
    assert {"vanilla": other} == trainer.LOSSES
    with pytest.raises(ImportError, match=r"has no a_trainer:LOSSES\[gone\]"):
        integration(seams={"a_trainer:LOSSES[gone]": ("x", ())}).enable()


def test_context_manager_restores_after_an_exception_and_nests(trainer):
    a = integration()
    with pytest.raises(KeyError), a.enabled():
        assert answers(trainer) == ["ours"] * 5
        with a.enabled():
            pass
        assert answers(trainer) == ["ours"] * 5
        raise KeyError
    assert answers(trainer) == ["theirs"] * 5


def test_a_module_loaded_after_enable_is_restored_too(trainer, monkeypatch):
    a = integration(seams={"a_trainer:returns": ("rewards, *, gamma", ("a_trainer.loop", "a_trainer.late"))})
    a.enable()
    late = types.ModuleType("a_trainer.late")
    late.returns = trainer.returns
    monkeypatch.setitem(sys.modules, "a_trainer.late", late)
    a.disable()
    assert late.returns(1) == "theirs"


def test_parameters_may_be_those_of_the_attribute_beside_it(trainer):
    made = lambda wanted: _seam.Integration(  # noqa: E731
        "a", "a-trainer", "1.2", "2", [_seam.Seam("a_trainer:PPO.train", ours, wanted, parameters_in="helper")]
    )
    made("x").check()
    with pytest.raises(ImportError, match=r"must take \(self, batch\), in .* it takes \(x\)"):
        made("self, batch").check()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"at_least": "1.5"}, r"a-trainer>=1.5,<2 is supported, 1.4.2 is installed; nothing was changed"),
        ({"below": "1.4"}, r"a-trainer>=1.2,<1.4 is supported, 1.4.2 is installed"),
        ({"seams": {"a_trainer:gone": ("x", ())}}, r"a-trainer 1.4.2 has no a_trainer:gone .*nothing was changed"),
        ({"seams": {"a_trainer.gone:f": ("x", ())}}, r"has no a_trainer.gone:f"),
        (
            {"seams": {"a_trainer:PPO.train": ("self", ())}},
            r"PPO.train must take \(self\), in .* it takes \(self, batch\)",
        ),
        (
            {"seams": {"a_trainer:returns": ("rewards, gamma", ())}},
            r"it takes \(rewards, \*, gamma\); nothing was changed",
        ),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_and_nothing_is_touched(trainer, changes, says):
    before = everything(trainer)
    with pytest.raises(ImportError, match=says) as raised:
        integration(**changes).enable()
    assert "\n" not in str(raised.value)
    assert everything(trainer) == before


def test_a_trainer_that_is_not_installed():
    with pytest.raises(
        ImportError, match=r"^ppo_fast.integrations: no-such-trainer is not installed; pip install 'no-such"
    ):
        _seam.require("no-such-trainer", "1", "2")


@pytest.mark.parametrize(
    "version, fits", [("2.0", True), ("2.0.0rc1", True), ("1.9.9", False), ("3.0.1", False), ("2.10+cpu", True)]
)
def test_versions_are_compared_as_numbers(monkeypatch, version, fits):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    if fits:
        assert _seam.require("x", "2", "3") == version
    else:
        with pytest.raises(ImportError, match="is supported"):
            _seam.require("x", "2", "3")


def test_twice_and_never_warn_and_change_nothing(trainer):
    a = integration()
    with pytest.warns(UserWarning, match="a is not enabled; nothing was changed"):
        a.disable()
    a.enable()
    with pytest.warns(UserWarning, match="a is enabled already; nothing was changed"):
        a.enable()
    a.disable()
    assert answers(trainer) == ["theirs"] * 5


def test_two_integrations_of_one_function_exclude_each_other(trainer):
    a, b = integration("a"), integration("b")
    a.enable()
    with pytest.raises(
        RuntimeError, match=r"b: a_trainer:returns is held by ppo_fast.integrations.a; call its disable\(\)"
    ):
        b.enable()
    a.disable()
    b.enable()
    b.disable()
    assert answers(trainer) == ["theirs"] * 5


def test_a_subclass_with_its_own_method_is_named(trainer):
    class Mine(trainer.Child):
        def train(self, batch):
            return "mine"

    a = integration()
    with pytest.warns(UserWarning, match="Mine has a train of its own, which stays as it is"):
        a.enable()
    assert Mine().train(1) == "mine"
    a.disable()


def test_what_others_replaced_since_is_left_and_named(trainer):
    a = integration()
    a.enable()
    trainer.returns = other = lambda rewards: "others"
    with pytest.warns(UserWarning, match="a_trainer.returns was replaced by others since enable"):
        a.disable()
    assert trainer.returns is other and trainer.PPO().train(1) == "theirs"


@pytest.mark.parametrize("name", TRAINERS)
def test_importing_changes_nothing_and_enable_is_exact(name):
    """In a process of its own: every attribute that the integration names, before import, after it, enabled, disabled."""
    code = f"""
        import importlib, sys, warnings
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module("ppo_fast.integrations.{name}")
        except ImportError as error:
            assert "\\n" not in str(error), error
            print("SKIP", error)
            sys.exit()
        seams = module._integration.seams
        from ppo_fast.integrations._seam import attributes_of
        state = lambda: [attributes_of(s.owner()).get(s.name) for s in seams]
        before = state()
        assert not any(now is s.ours for now, s in zip(before, seams))
        module.enable()
        assert all(now is s.ours for now, s in zip(state(), seams))
        module.disable()
        assert all(a is b for a, b in zip(before, state()))
        with module.enabled():
            assert all(now is s.ours for now, s in zip(state(), seams))
        assert all(a is b for a, b in zip(before, state()))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("SKIP"):
        pytest.skip(done.stdout.strip())


def test_every_integration_is_listed():
    import pathlib

    folder = pathlib.Path(importlib.import_module("ppo_fast.integrations").__file__).parent
    assert {x.stem for x in folder.glob("[!_]*.py")} - {"cleanrl"} == set(TRAINERS)  # that one rewrites scripts
