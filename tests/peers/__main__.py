"""Runs other trainers' own tests without and with us, and writes how many passed to bench/results/peers/tests.csv.

    python -m tests.peers                          # every trainer
    python -m tests.peers sb3 verl                 # these
    python -m tests.peers verl --source path/to/verl        # test files from a checkout that is here

Each trainer goes, pinned, into build/peers/<name>, with the files of its tests from its source archive or its repository.
Exit code 1 where a test passes without us and does not pass with us.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bench import machine

from .specs import PEERS, Peer

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["trainer", "package", "version", "tests_of", "passed_without", "passed_with", "failed_without", "failed_with",
           "skipped", "seconds_without", "seconds_with"]  # fmt: skip


@dataclass(frozen=True)
class PeersConfig:
    """Other trainers' own tests, without and with ppo_fast."""

    trainers: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names in ppo_fast.integrations; none: all that have tests."""
    source: Path | None = None
    """A checkout of the trainer's repository, in place of cloning it. For one trainer at a time."""
    out: Path = ROOT / "bench/results/peers/tests.csv"
    """Rows of trainers that are not run stay."""
    folder: Path = ROOT / "build/peers"
    """Where trainers are installed; may be deleted."""
    timeout: float = 1800.0
    """Seconds for one run of one trainer's tests."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"tests.peers: pip {' '.join(arguments)} failed: {done.stderr.strip()}")


def installed(peer: Peer, folder: Path) -> Path:
    """The trainer and what stands beside it, in a folder of packages."""
    packages = folder / "packages"
    marker = packages / "complete"
    wanted = [*([] if peer.from_source else [f"{peer.package}=={peer.version}"]), *peer.beside]
    if not marker.exists() or marker.read_text().split() != wanted:
        shutil.rmtree(packages, ignore_errors=True)
        packages.mkdir(parents=True)
        if wanted:
            pip("install", "--no-deps", "--target", str(packages), *wanted)
        marker.write_text("\n".join(wanted))
    return packages


def source_of(peer: Peer, folder: Path, given: Path | None) -> tuple[Path, str]:
    """The root of the files that its tests are in, and what to call them."""
    at = folder / "source"
    if isinstance(peer.tests_from, str):
        if not at.exists():
            download = folder / "download"
            wanted = f"{peer.package}=={peer.version}"
            pip("download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", str(download), wanted)
            (archive,) = download.glob("*.tar.gz")
            with tarfile.open(archive) as tar:
                tar.extractall(folder / "unpacked", filter="data")
            (unpacked,) = (folder / "unpacked").iterdir()
            unpacked.rename(at)
        return at, f"sdist {peer.version}"
    url, tag = peer.tests_from
    if given is not None:  # a copy: tests may write beside themselves
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir(parents=True)
        git = ["git", "-C", str(given)]
        commit = subprocess.run([*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True)
        archive = subprocess.Popen([*git, "archive", "HEAD"], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(at)], stdin=archive.stdout, check=True)
        _remove(at, peer.shadows)
        return at, f"{url.rsplit('/', 2)[-2]}/{url.rsplit('/', 1)[-1]}@{commit.stdout.strip()}"
    if not at.exists():
        subprocess.run(["git", "clone", "-q", "--depth", "1", "--branch", tag, url, str(at)], check=True)
        _remove(at, peer.shadows)
    return at, tag


def _remove(root: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        shutil.rmtree(root / folder)


def run_tests(peer: Peer, packages: Path, source: Path, enabled: bool, timeout: float) -> dict[str, str]:
    """Outcome by test."""
    report = source / f"report-{'with' if enabled else 'without'}.xml"
    report.unlink(missing_ok=True)
    stubs = ROOT / "tests/peers/stubs" / peer.name
    path = [ROOT, ROOT / "tests/peers/plugin", packages, *(source / x for x in peer.from_source), stubs]
    environment = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, **peer.environment,
        "PPO_FAST_PEER": peer.name if enabled else "",
        "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "ppo_fast_peer", "-p", "no:cacheprovider",
        f"--junitxml={report}", *peer.paths, *peer.arguments,
    ]  # fmt: skip
    log = report.with_suffix(".log")
    with log.open("w") as file:
        subprocess.run(command, cwd=source, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=timeout)
    if not report.exists():
        raise SystemExit(f"tests.peers: {peer.name}: pytest wrote no report; see {log}")
    outcomes = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def measure(peer: Peer, config: PeersConfig) -> tuple[dict[str, str], list[str]]:
    folder = config.folder / peer.name
    packages = installed(peer, folder)
    source, tests_of = source_of(peer, folder, config.source)
    seconds, outcomes = {}, {}
    for enabled in (False, True):
        start = time.perf_counter()
        outcomes[enabled] = run_tests(peer, packages, source, enabled, config.timeout)
        seconds[enabled] = time.perf_counter() - start
    count = lambda enabled, what: str(sum(x == what for x in outcomes[enabled].values()))  # noqa: E731
    lost = [
        test
        for test, outcome in outcomes[False].items()
        if outcome == "passed" and outcomes[True].get(test) != "passed"
    ]
    row = {
        "trainer": peer.name, "package": peer.package, "version": peer.version, "tests_of": tests_of,
        "passed_without": count(False, "passed"), "passed_with": count(True, "passed"),
        "failed_without": count(False, "failed"), "failed_with": count(True, "failed"), "skipped": count(True, "skipped"),
        "seconds_without": f"{seconds[False]:.1f}", "seconds_with": f"{seconds[True]:.1f}",
    }  # fmt: skip
    return row, lost


def main(config: PeersConfig) -> int:
    unknown = [name for name in config.trainers if name not in PEERS]
    if unknown:
        raise SystemExit(f"tests.peers: trainers must be of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if config.source is not None and len(config.trainers) != 1:
        raise SystemExit("tests.peers: --source is for one trainer; name it")
    rows = {}
    if config.out.exists():
        with config.out.open() as file:
            rows = {row["trainer"]: row for row in csv.DictReader(file)}
    facts, any_lost = machine.facts(), False
    table = Table("trainer", "version", "passed without", "with", "failed without", "with", "skipped")
    console = Console()
    for name in config.trainers or tuple(PEERS):
        with console.status(f"{name}: its own tests, without and with ppo_fast"):
            row, lost = measure(PEERS[name], config)
        rows[name] = row | facts
        table.add_row(name, *(row[x] for x in ("version", *COLUMNS[4:9])))
        for test in lost:
            console.print(f"{name}: passes without us only: {test}", style="red", markup=False)
        any_lost |= bool(lost)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        with config.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *facts], extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))
    console.print(table)
    return int(any_lost)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PeersConfig, description=__doc__)))
