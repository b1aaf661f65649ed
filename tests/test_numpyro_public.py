"""What importing the NumPyro twin does and does not do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import llmppl.numpyro

FOLDER = Path(llmppl.numpyro.__file__).parent
MODULES = sorted(
    ".".join(("llmppl.numpyro", *path.relative_to(FOLDER).with_suffix("").parts)).removesuffix(".__init__")
    for path in FOLDER.rglob("*.py")
)


def python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return result.stdout.strip()


def test_every_module_is_imported_without_torch() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {MODULES}:\n"
        "    importlib.import_module(name)\n"
        "print([name for name in ('torch', 'pyro', 'transformers', 'peft') if name in sys.modules])"
    )
    assert python(code) == "[]"


def test_a_missing_jax_is_answered_by_the_command_that_installs_it() -> None:
    code = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, package=None: None if name == 'jax' else find(name, package)\n"
        "import llmppl\n"
        "try:\n"
        "    import llmppl.numpyro\n"
        "except ModuleNotFoundError as error:\n"
        "    print(error)"
    )
    assert "pip install 'pyro-llmppl[numpyro]'" in python(code)


@pytest.mark.parametrize("name", llmppl.numpyro.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(llmppl.numpyro, name) is not None
    assert name in dir(llmppl.numpyro)


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmppl.numpyro.nothing


def test_every_package_is_installed() -> None:
    """Packages are listed by hand; a folder that is not would be missing from an installation."""
    listed = (FOLDER.parent.parent / "pyproject.toml").read_text()
    for path in FOLDER.rglob("__init__.py"):
        name = ".".join(("llmppl.numpyro", *path.parent.relative_to(FOLDER).parts))
        assert f'"{name}"' in listed
