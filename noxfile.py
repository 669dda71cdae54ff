"""Everything that is run on this repository. ``nox`` alone runs lint, types, tests and paper.

All sessions share one environment in ``.nox/env``: PyTorch alone weighs a gigabyte. It is made on the first run and
made again when pyproject.toml, constraints.txt or the Python version changes.
"""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests", "paper"]
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).parent
ENVIRONMENT = ROOT / ".nox" / "env"
SCRIPTS = ENVIRONMENT / ("Scripts" if sys.platform == "win32" else "bin")
_SAME = ("torch==2.13.0", "transformers==5.23.0")
PEERS = {
    "tuned-lens": ("tuned-lens==0.2.0", *_SAME),
    "nnterp": ("nnterp==1.3.0", "nnsight==0.7.0", *_SAME),  # it does not know nnsight 0.8 yet
    "TransformerLens": ("transformer-lens==4.3.0", *_SAME),
}
"""Environment of a package that benchmarks.lens compares with -> what it holds; the other peers are in ours."""
BENCHED = ("smollm2-135m-instruct", "gemma-3-270m")
TREES = ("src", "experiments", "tests", "benchmarks", "noxfile.py")


def run(session: nox.Session, *command: str, cwd: Path = ROOT, **extra: str) -> None:
    """Run a command of the shared environment."""
    prepare(session)
    path = os.pathsep.join([str(SCRIPTS), os.environ["PATH"]])
    # No telemetry, no hub; and code of the tree that is run, also where that is a copy.
    env = {
        "PATH": path,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": f"{cwd / 'src'}",
        **extra,
    }
    with session.chdir(cwd):
        session.run(str(SCRIPTS / command[0]), *command[1:], env=env, external=True)


def prepare(session: nox.Session) -> None:
    """Make the shared environment, unless what stands was made from the same files."""
    sources = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    wanted = hashlib.sha256(b"\0".join([sys.version.encode(), str(ROOT).encode(), *sources])).hexdigest()
    stamp = ENVIRONMENT / "made-from"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    session.log("making the environment in .nox/env (a few minutes, once)")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    # virtualenv comes with nox; the standard library's venv is a separate package on some systems.
    session.run(sys.executable, "-m", "virtualenv", "--quiet", str(ENVIRONMENT), external=True)
    # Not compiled: of all modules a small part is ever imported, which is compiled then.
    install = [str(SCRIPTS / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    with session.chdir(ROOT):
        session.run(*install, "pip>=26.3", external=True)  # known to check the hashes of constraints
        hashes = ["--no-require-hashes", "--constraint", "constraints.hashes.txt"]
        session.run(*install, *hashes, "--editable", ".[dev]", external=True)
    stamp.write_text(wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    run(session, "ruff", "check", *TREES)
    run(session, "ruff", "format", "--check", *TREES)


@nox.session
def types(session: nox.Session) -> None:
    """Check types."""
    run(session, "mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """Run unit, pipeline, snapshot and claim tests, file by file on all cores (arguments go to pytest alone)."""
    # 2 GB each. In the order of the files: by their number of tests, the longest would come last.
    spread = ["-n", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder"]
    run(session, "python", "-m", "pytest", *(session.posargs or spread), OMP_NUM_THREADS="1")


@nox.session
def tiny(session: nox.Session) -> None:
    """Run the whole pipeline and the originals' profile on tiny models in a temporary folder (a few minutes)."""
    files = ("tests/test_snapshots.py", "tests/experiments/pipeline/test_originals.py")
    run(session, "python", "-m", "pytest", "-m", "tiny", *files, *session.posargs)


@nox.session
def faults(session: nox.Session) -> None:
    """Damage, interrupt and starve every stage of a run's life in every way; the tests take a sample of that."""
    run(session, "python", "-m", "tests.faults", *session.posargs)


@nox.session
def verify(session: nox.Session) -> None:
    """Check that results belong to the code; re-run one model in a clone of HEAD and compare by tolerance."""
    run(session, "python", "-m", "experiments.pipeline", "status")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        session.run("git", "clone", "--quiet", str(ROOT), str(clone), external=True)
        picks = session.posargs or ["probing@smollm2-135m-instruct", "logit_lens@smollm2-135m-instruct"]
        run(session, "python", "-m", "experiments.pipeline", "reproduce", *picks, cwd=clone)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure every job beside its peers, which get environments of their own, for the README (an hour or more)."""
    prepare(session)
    for package, wanted in PEERS.items():
        folder = ROOT / ".nox" / "peers" / package
        stamp = folder / "made-from"
        if not (stamp.exists() and stamp.read_text() == "\n".join(wanted)):
            shutil.rmtree(folder, ignore_errors=True)
            session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder), external=True)
            session.run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted, external=True)
            stamp.write_text("\n".join(wanted))
    for model in BENCHED:
        run(session, "python", "-m", "benchmarks.lens", model)
        run(session, "python", "-m", "benchmarks.training", model)
    # scikit-learn takes hours for the unscaled states of the other
    run(session, "python", "-m", "benchmarks.probes", BENCHED[0])
    run(session, "python", "-m", "benchmarks.grpo", BENCHED[0])
    run(session, "python", "-m", "benchmarks.grpo", BENCHED[0], "--members", "6")


@nox.session
def paper(session: nox.Session) -> None:
    """Build paper/paper.pdf, paper/index.html and docs/REPRODUCING.md from the committed results."""
    run(session, "python", "-m", "experiments.report.build")
    run(session, "python", "-m", "experiments.report.page")


@nox.session
def reproduce(session: nox.Session) -> None:
    """Regenerate everything from the weights: ``nox -s reproduce [-- STAGE|MODEL ...]``, ``-- --help`` for more."""
    run(session, "python", "-m", "experiments.pipeline", "reproduce", *session.posargs)
