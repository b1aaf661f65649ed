"""What the wheel and the sdist hold, against the sources: by setuptools alone, without a network.

python tests/package/contents.py dist/*
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGEST = 1_000_000
ADAPTERS = "llmppl/demo/adapters/"


def copy_of(root: Path, folder: Path) -> Path:
    """The tree without what was built or downloaded in it: a stale ``build/`` would find its way into a wheel."""
    wanted = ["llmppl", "guides", "models", "tests", *(p.name for p in root.iterdir() if p.is_file())]
    folder.mkdir(parents=True)
    for name in wanted:
        source, target = root / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy2(source, target)
    return folder


def built(kind: str, tree: Path, out: Path) -> Path:
    """A ``"wheel"`` or an ``"sdist"`` of a tree, by the setuptools of this Python."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the {kind} of {tree} cannot be built:\n{done.stdout}{done.stderr}")
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def sources(root: Path = ROOT) -> dict[str, bytes]:
    """Every file of the package, by its name in a wheel; guides and models through their links."""
    found = {}
    for base, folder in (("llmppl", "llmppl"), ("llmppl/guides", "guides"), ("llmppl/models", "models")):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[f"{base}/{path.relative_to(root / folder).as_posix()}"] = path.read_bytes()
    return found


def modules(wheel: Path) -> list[str]:
    """The modules of the package, by their dotted names."""
    names = [n.removesuffix(".py").removesuffix("/__init__") for n in files_of(wheel) if n.endswith(".py")]
    return sorted(n.replace("/", ".") for n in names)


def faults_of_wheel(wheel: Path, root: Path = ROOT) -> list[str]:
    """What is wrong with a wheel, a sentence each."""
    files, wanted = files_of(wheel), sources(root)
    package = {name: content for name, content in files.items() if ".dist-info/" not in name}
    found = [f"{name} is not in the wheel." for name in sorted(wanted.keys() - package.keys())]
    found += [f"{name} is in the wheel and not in the tree." for name in sorted(package.keys() - wanted.keys())]
    found += [f"{n} differs from the tree." for n in sorted(wanted.keys() & package.keys()) if wanted[n] != package[n]]
    found += ["py.typed is not in the wheel."] if "llmppl/py.typed" not in files else []
    found += too_large({name: len(content) for name, content in files.items()})
    (metadata,) = (text.decode() for name, text in files.items() if name.endswith(".dist-info/METADATA"))
    extras = set(Parser().parsestr(metadata).get_all("Provides-Extra", []))
    declared = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    found += [f"the extras are {sorted(extras)}, not {sorted(declared)}."] if extras != declared else []
    return found


def faults_of_sdist(sdist: Path, wheel: Path, folder: Path) -> list[str]:
    """What is wrong with an sdist: it makes the wheel, byte by byte, and has no large file.

    :param wheel: built from the tree.
    :param folder: an empty one, to build in.
    """
    tree = unpacked(sdist, folder / "unpacked")
    found = too_large(
        {
            p.relative_to(tree).as_posix(): p.stat().st_size
            for p in tree.rglob("*")
            if p.is_file() and not p.is_symlink()
        }
    )
    if (tree / "tests").exists():
        found.append("the sdist has part of the tests.")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        if not (tree / name).is_file():
            found.append(f"{name} is not in the sdist.")
    other, ours = files_of(built("wheel", tree, folder / "wheel")), files_of(wheel)
    # RECORD is the list of the others.
    differ = [n for n in sorted(ours.keys() | other.keys()) if ours.get(n) != other.get(n)]
    return found + [f"{name} differs between the wheel of the sdist and that of the tree." for name in differ]


def too_large(sizes: dict[str, int]) -> list[str]:
    return [
        f"{name} has {size} bytes, more than {LARGEST}."
        for name, size in sorted(sizes.items())
        if size > LARGEST and not re.search(re.escape(ADAPTERS) + r"[^/]+\.safetensors$", name)
    ]


def main() -> None:
    """Check a wheel and an sdist that were built."""
    (wheel,) = (Path(a) for a in sys.argv[1:] if a.endswith(".whl"))
    (sdist,) = (Path(a) for a in sys.argv[1:] if a.endswith(".tar.gz"))
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of(ROOT, Path(folder) / "tree")
        of_tree = built("wheel", tree, Path(folder) / "wheel")
        found = faults_of_wheel(wheel) + faults_of_sdist(sdist, of_tree, Path(folder) / "sdist")
        ours, other = files_of(wheel), files_of(of_tree)
        found += [f"{n} differs from the tree's wheel." for n in sorted({*ours, *other}) if ours.get(n) != other.get(n)]
    print(
        "\n".join(found) or f"{wheel.name}: {len(modules(wheel))} modules; the tree and the sdist make the same wheel"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
