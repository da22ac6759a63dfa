"""What leaves this repository: the wheel, the source archive, the stubs, and one version everywhere.

The wheel is built in isolation and once; where the build dependencies cannot be had (no network), those tests say so.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10: pytest brings it
    import tomli as tomllib

import ppo_fast as pf
from ppo_fast import _C

ROOT = Path(__file__).parents[1]
IN_REPOSITORY = (ROOT / "csrc").exists() and (ROOT / "pyproject.toml").exists()
needs_repository = pytest.mark.skipif(not IN_REPOSITORY, reason="needs the repository")
#: A build that needs another one's variables (its folder of objects) is no isolated build.
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PPO_FAST_", "PYTHONPATH"))}
CLEAN["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
CLEAN["PPO_FAST_CUDA"] = "0"  # what nvcc makes is looked at in test_cuda_build.py, and once is enough
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text()) if IN_REPOSITORY else {}


def run(*command, cwd, timeout=600):
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


# --- one version, one list of names -----------------------------------------------------------------------------------


@needs_repository
def test_one_version():
    declared = PYPROJECT["project"]["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M).group(1)
    assert pf.__version__ == declared == newest


def names_of(requirements):
    return {re.split(r"[\[<>=!~; ]", r)[0].lower().replace("_", "-") for r in requirements}


@needs_repository
def test_every_dependency_is_pinned():
    pinned = names_of(line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    lists = [PYPROJECT["build-system"]["requires"], PYPROJECT["project"]["dependencies"]]
    lists += PYPROJECT["project"]["optional-dependencies"].values()
    wanted = names_of(requirement for found in lists for requirement in found)
    assert not wanted - pinned - {"ppo-fast"}


@needs_repository
def test_stubs_are_those_of_the_built_module():
    import stubs

    assert stubs.STUB.read_text() == stubs.stub(_C), "the bindings changed: python tests/stubs.py"


@needs_repository
def test_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    names: dict = {}  # read from top to bottom
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_public_names_have_docstrings():
    for name in pf.__all__:
        member = getattr(pf, name)
        assert (member.__doc__ or "").strip(), f"{name} has no docstring"
    assert sorted(pf.__all__) == list(pf.__all__), "__all__ is sorted, capitals first"


# --- the shared object ------------------------------------------------------------------------------------------------


def check_shared_object(path):
    """Nothing of torch or CUDA is linked, and nothing points at the machine that built it."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
    assert not {n for n in needed if re.search("torch|c10|cuda|nvrtc|python", n)}, needed
    assert not any("/" in n for n in needed), needed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, dynamic
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", str(path)], capture_output=True, text=True, check=True
    ).stdout
    defined = [line.split()[-1] for line in symbols.splitlines() if " GLOBAL DEFAULT " in line and " UND " not in line]
    assert defined == [f"PyInit_{Path(path).name.partition('.')[0]}"], defined


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
@pytest.mark.parametrize("module", ["_C", "_C_xla"])
def test_shared_object_of_the_editable_install(module):
    check_shared_object(pytest.importorskip(f"ppo_fast.{module}").__file__)


# --- the wheel and the source archive ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def archives(tmp_path_factory):
    """(sdist, wheel built from it), with the build dependencies installed into an environment of the build's own."""
    if not IN_REPOSITORY:
        pytest.skip("needs the repository")
    pytest.importorskip("build")
    source, out = tmp_path_factory.mktemp("source") / "ppo_fast", tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode != 0:
        pytest.skip("needs git")
    for name in files.stdout.splitlines():  # neither what is built here nor what git ignores
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], env=CLEAN,
                          capture_output=True, text=True, timeout=2400)  # fmt: skip
    if done.returncode != 0 and re.search("No matching distribution|NewConnectionError|Temporary failure", done.stdout):
        pytest.skip("the build dependencies cannot be installed here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ppo_fast: built _C" in done.stdout and "; CUDA: " in done.stdout  # the build says what it built and why
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def installed(archives, tmp_path_factory):
    """A folder with the wheel unpacked by pip; torch stays the one of this environment."""
    target = tmp_path_factory.mktemp("site")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, archives[1], cwd=target)
    return target


def run_installed(installed, code, cwd):
    """Python that sees the wheel before everything else, and never this repository."""
    head = f"import sys; sys.path[:0] = [{str(installed)!r}]\n"
    return run(sys.executable, "-I", "-c", head + code, cwd=cwd)


@pytest.mark.xdist_group("wheel")
class TestArchives:
    def test_wheel_contents(self, archives):
        names = zipfile.ZipFile(archives[1]).namelist()
        assert {"ppo_fast/__init__.py", "ppo_fast/py.typed", "ppo_fast/_C.pyi", "ppo_fast/ops/ppo_loss.py",
                "ppo_fast/trainer/__init__.py"} <= set(names)  # fmt: skip
        assert len([n for n in names if re.fullmatch(r"ppo_fast/_C\..*(so|pyd)", n)]) == 1
        assert any(n.startswith("ppo_fast/bench/") for n in names)
        assert any(n.endswith("licenses/LICENSE") for n in names)
        roots = {n.split("/")[0] for n in names}
        assert roots == {"ppo_fast", next(r for r in roots if r.endswith(".dist-info"))}
        assert not [n for n in names if re.search(r"tests?/|csrc|\.(cpp|h|inc|o|csv|pyc)$", n)]

    def test_wheel_metadata(self, archives):
        wheel = zipfile.ZipFile(archives[1])
        text = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
        assert f"Version: {pf.__version__}\n" in text
        assert "License-Expression: Apache-2.0" in text and "Requires-Python: >=3.10" in text
        assert re.search(r"^Requires-Dist: torch>=2\.10$", text, re.M)
        points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
        assert "ppo-fast = ppo_fast.cli:main" in points

    def test_shared_object_of_the_wheel(self, installed):
        paths = sorted((installed / "ppo_fast").glob("_C*.so"))
        assert paths
        for path in paths:
            check_shared_object(path)
            assert str(ROOT).encode() not in path.read_bytes()

    def test_nothing_knows_where_it_was_built(self, archives):
        wheel = zipfile.ZipFile(archives[1])
        for name in wheel.namelist():
            assert str(ROOT).encode() not in wheel.read(name), name

    def test_installed_wheel_works(self, installed, tmp_path):
        out = run_installed(installed, """
import torch, ppo_fast as pf
assert pf.__file__.startswith(sys.path[0]), pf.__file__
new = torch.randn(3, 1000)
leaf = new[0].clone().requires_grad_()
out = pf.ppo_loss(leaf, *new[1:])
out.loss.backward()
with pf.use_backend("reference"):
    truth = pf.ppo_loss(*new)
torch.testing.assert_close(out.loss.detach(), truth.loss)
adv, ret = pf.gae(torch.randn(5, 3), torch.randn(5, 3), torch.randn(3))
import ppo_fast.bench
print(adv.shape[0], leaf.grad.isfinite().all().item(), pf.__version__, sep="/")
print(pf.explain())
""", tmp_path)  # fmt: skip
        assert out.startswith(f"5/True/{pf.__version__}\n") and "cpu        yes" in out

    def test_command_line(self, installed, tmp_path):
        code = "from ppo_fast.cli import main\nassert main(['doctor']) == 0"
        assert "ppo_fast backends" in run_installed(installed, code, tmp_path)

    def test_source_archive_has_what_a_build_and_the_tests_need(self, archives):
        with tarfile.open(archives[0]) as archive:
            names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
        tracked = run("git", "ls-files", "csrc", "tests", "ppo_fast", "setup.py", "CMakeLists.txt", cwd=ROOT).split()
        assert not {t for t in tracked if (ROOT / t).is_file()} - names
        assert {"LICENSE", "README.md", "pyproject.toml", "constraints.txt", "Makefile"} <= names
        assert any(n.startswith("bench/") for n in names)
        assert not [n for n in names if n.endswith((".so", ".pyc", ".o"))]

    def test_tests_of_the_source_archive_pass_against_the_wheel(self, archives, installed, tmp_path):
        """From another folder, with nothing of the repository on the path: a selection, for time."""
        with tarfile.open(archives[0]) as archive:
            archive.extractall(tmp_path, filter="data")
        (source,) = tmp_path.iterdir()
        shutil.rmtree(source / "ppo_fast")  # only the wheel's is left
        code = f"""
import pytest, ppo_fast
assert ppo_fast.__file__.startswith({str(installed)!r}), ppo_fast.__file__
sys.exit(pytest.main(["-p", "no:cacheprovider", "-x", "tests/test_config.py", "tests/test_dlpack.py",
                      "tests/test_ppo_loss.py", "tests/test_gae.py"]))
"""
        assert " passed" in run_installed(installed, code, source)
