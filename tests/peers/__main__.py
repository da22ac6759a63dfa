"""Runs other trainers' own tests without and with us, and our parity tests against the same installation, and writes how many
passed to bench/results/peers/tests.csv.

    python -m tests.peers                          # every trainer
    python -m tests.peers sb3 verl                 # these
    python -m tests.peers verl --source path/to/verl        # test files from a checkout that is here

Each trainer goes, pinned, into build/peers/<name>, with the files of its tests from its source archive or its repository.
Parity tests are those of tests/integrations: what is replaced, against theirs. Exit code 1 where a test passes without us and
does not pass with us, and where a parity test fails or none runs.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from bench import machine

from .specs import PEERS, Peer

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["trainer", "package", "version", "tests_of", "passed_without", "passed_with", "failed_without", "failed_with",
           "skipped", "seconds_without", "seconds_with", "parity_passed", "parity_failed"]  # fmt: skip


@dataclass(frozen=True)
class PeersConfig:
    """Other trainers' own tests, without and with ppo_fast."""

    trainers: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names in ppo_fast.integrations; none: all."""
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
    if peer.tests_from == "wheel":
        return folder / "packages", f"wheel {peer.version}"
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


def run_pytest(
    peer: Peer, path: Sequence[Path], cwd: Path, report: Path, timeout: float, *arguments: str, enabled: bool = False
) -> dict[str, str]:
    """Outcome by test."""
    report.unlink(missing_ok=True)
    environment = {
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ, **peer.environment,
        "PPO_FAST_PEER": peer.name if enabled else "",
        "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    log = report.with_suffix(".log")
    with log.open("w") as file:
        subprocess.run(command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=timeout)
    if not report.exists():
        raise SystemExit(f"tests.peers: {peer.name}: pytest wrote no report; see {log}")
    outcomes = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return outcomes


def count(outcomes: dict[str, str], what: str) -> str:
    return str(sum(x == what for x in outcomes.values()))


def measure(peer: Peer, config: PeersConfig) -> tuple[dict[str, str], list[str]]:
    """A line of the table, and what is wrong."""
    folder = config.folder / peer.name
    packages = installed(peer, folder)
    row = {"trainer": peer.name, "package": peer.package, "version": peer.version}
    source, wrong = folder, []
    if peer.paths or peer.from_source:
        source, row["tests_of"] = source_of(peer, folder, config.source)
    path = [ROOT, packages, *(source / x for x in peer.from_source), ROOT / "tests/peers/stubs" / peer.name]
    if peer.paths:
        theirs = {}
        for enabled, column in ((False, "without"), (True, "with")):
            start = time.perf_counter()
            theirs[column] = run_pytest(
                peer, [*path, ROOT / "tests/peers/plugin"], source, source / f"report-{column}.xml", config.timeout,
                "-p", "ppo_fast_peer", *peer.paths, *peer.arguments, enabled=enabled,
            )  # fmt: skip
            row[f"seconds_{column}"] = f"{time.perf_counter() - start:.1f}"
            row[f"passed_{column}"] = count(theirs[column], "passed")
            row[f"failed_{column}"] = count(theirs[column], "failed")
        row["skipped"] = count(theirs["with"], "skipped")
        lost = [t for t, x in theirs["without"].items() if x == "passed" and theirs["with"].get(t) != "passed"]
        wrong += [f"passes without us only: {test}" for test in lost]
    report = folder / "report-parity.xml"
    parity = run_pytest(
        peer, path, ROOT, report, config.timeout, f"tests/integrations/test_{peer.parity or peer.name}.py"
    )
    row["parity_passed"], row["parity_failed"] = count(parity, "passed"), count(parity, "failed")
    wrong += [f"differs from theirs: {test}" for test, outcome in parity.items() if outcome == "failed"]
    if row["parity_passed"] == "0":
        wrong.append(f"no parity test ran; see {report.with_suffix('.log')}")
    return row, wrong


def write(out: Path, row: dict[str, str]) -> None:
    """Puts the trainer's row in place of the one that is there; rows of others stay, also of those that ran meanwhile."""
    rows: dict[str, dict[str, str]] = {}
    if out.exists():
        with out.open() as file:
            rows = {line["trainer"]: line for line in csv.DictReader(file)}
    rows[row["trainer"]] = row
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *machine.facts()], extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def main(config: PeersConfig) -> int:
    unknown = [name for name in config.trainers if name not in PEERS]
    if unknown:
        raise SystemExit(f"tests.peers: trainers must be of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if config.source is not None and len(config.trainers) != 1:
        raise SystemExit("tests.peers: --source is for one trainer; name it")
    facts, any_wrong = machine.facts(), False
    table = Table("trainer", "version", "passed", "failed", "skipped", "parity passed", "failed",
                  caption="of its own tests: without → with ppo_fast")  # fmt: skip
    console = Console()
    for name in config.trainers or tuple(PEERS):
        peer = PEERS[name]
        with console.status(f"{name}: its own tests, without and with ppo_fast, and ours of both"):
            row, wrong = measure(peer, config)
        write(config.out, row | facts)
        own = [f"{row[f'{x}_without']} → {row[f'{x}_with']}" if peer.paths else "–" for x in ("passed", "failed")]
        table.add_row(
            name, peer.version, *own, *(row.get(x, "–") for x in ("skipped", "parity_passed", "parity_failed"))
        )
        for what in wrong:
            console.print(f"{name}: {what}", style="red", markup=False)
        any_wrong |= bool(wrong)
    console.print(table)
    return int(any_wrong)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(PeersConfig, description=__doc__)))
