"""What is built of this tree: the wheel and the sdist. ``make test-package`` installs them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from package import contents


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return contents.copy_of(contents.ROOT, tmp_path_factory.mktemp("package") / "tree")


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return contents.built("wheel", tree, tree.parent / "wheel")


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    assert contents.faults_of_wheel(wheel) == []
    names = contents.modules(wheel)
    assert {"llmppl.guides.gflownet", "llmppl.models.infilling", "llmppl.numpyro.training.fit"} <= set(names)


def test_the_sdist_makes_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = contents.built("sdist", tree, tmp_path / "sdist")
    assert contents.faults_of_sdist(sdist, wheel, tmp_path) == []


def test_a_forgotten_module_a_stale_one_and_a_large_file_are_found(wheel: Path, tmp_path: Path) -> None:
    files = contents.files_of(wheel)
    files["llmppl/stale.py"] = files.pop("llmppl/guides/gflownet.py")
    files["llmppl/demo/adapters/weights.bin"] = bytes(contents.LARGEST + 1)
    forged = tmp_path / wheel.name
    with zipfile.ZipFile(forged, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    assert contents.faults_of_wheel(forged) == [
        "llmppl/guides/gflownet.py is not in the wheel.",
        "llmppl/demo/adapters/weights.bin is in the wheel and not in the tree.",
        "llmppl/stale.py is in the wheel and not in the tree.",
        "llmppl/demo/adapters/weights.bin has 1000001 bytes, more than 1000000.",
    ]
