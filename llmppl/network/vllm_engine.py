"""Texts drawn by vLLM, and weighed by the model itself."""

from __future__ import annotations

import gc
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmppl.network.random_states import randomness_kept
from llmppl.text import PAD
from llmppl.text.arguments import check_count

if TYPE_CHECKING:
    from llmppl.network.text_law import TextLaw

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""

COLDEST = 0.01
"""The least temperature that vLLM takes as it is."""

ENVIRONMENT = {
    # In this process: its adapters come and go, and nothing has to be sent.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""What vLLM is told where the user's environment says nothing."""


@dataclass
class Drift:
    """How far vLLM's log-probabilities of the texts that it drew are from the model's own.

    :param texts: drawn so far.
    :param total: sum of the absolute differences, nats a text.
    :param largest: of them.
    """

    texts: int = 0
    total: float = 0.0
    largest: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.texts if self.texts else 0.0

    def add(self, differences: Tensor) -> None:
        self.texts += len(differences)
        self.total += float(differences.abs().sum())
        self.largest = max(self.largest, float(differences.abs().max()))

    def __repr__(self) -> str:
        return f"Drift({self.texts} texts, mean {self.mean:.1e} and at most {self.largest:.1e} nats)"


@dataclass
class _Loaded:
    """An adapter as vLLM has it."""

    version: int
    number: int
    folder: Path


@dataclass
class VLLM:
    """While it is on, what programs and guides draw from a language model is drawn by vLLM::

        with VLLM(lm) as engine:
            posterior = importance(story, guide, num_samples=4096)(beginning, ending)
        print(engine.drift)

    Log-probabilities are still the model's own: each text that vLLM has written is scored by the network that scores
    the program, so that weights compare like with like, and gradients exist. vLLM's sums are of another order (and, in
    half precision, of other rounding): :attr:`drift` says by how much they differ, which is also how far what is drawn
    is from the law that the weights assume. A guide's adapter is handed over as it stands, and again whenever training
    has changed it.

    Drawn by the model's own network as before, more slowly and with no other result: texts under a grammar, behind
    :class:`~llmppl.Embedded` arrays or virtual tokens, with ``min_tokens`` beside stop strings of several tokens, with
    ``sampling_dtype``, what :func:`~llmppl.smc` writes token by token, and twisted laws. :attr:`drawn` and
    :attr:`left` count both.

    :param lm: an :class:`~llmppl.LM`. Its adapted views and all guides on it draw by the same engine.
    :param max_rank: largest rank of an adapter; beyond it the model's own network draws.
    :param dtype: of vLLM's copy of the weights; the model's own by default.
    :param options: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization`` or ``max_model_len``.
    :raises ImportError: vLLM is not installed, or does not load.
    :raises ValueError: an architecture that vLLM does not run; weights that have changed since it was started.
    """

    lm: Any
    max_rank: int = 16
    dtype: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)
    drift: Drift = field(default_factory=Drift, init=False)
    drawn: int = field(default=0, init=False)
    left: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        check_count(max_rank=self.max_rank)
        if self.max_rank > RANKS[-1]:
            raise ValueError(f"max_rank={self.max_rank} is more than vLLM's {RANKS[-1]}.")
        base = getattr(self.lm, "base", None)
        if base is None or not hasattr(base, "weights_version"):
            raise TypeError(f"lm must be an LM, got {type(self.lm).__name__}.")
        self.lm = base
        self._engine: Any = None
        self._loaded: dict[str, _Loaded] = {}
        self._number = 0

    def __enter__(self) -> VLLM:
        if self.lm.engine is not None:
            raise ValueError(f"{self.lm.engine!r} draws for this model already. Leave its block first.")
        vllm = _vllm()
        self._folder = Path(tempfile.mkdtemp(prefix="llmppl-vllm-"))
        try:
            self._write_model()
            device, dtype = next(self.lm.transformer.parameters()).device, self.dtype or self.lm.dtype
            given = {
                "dtype": str(dtype).removeprefix("torch."),
                "skip_tokenizer_init": True,
                "generation_config": "vllm",
                "logprobs_mode": "processed_logprobs",
                "distributed_executor_backend": "uni",
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(rank for rank in RANKS if rank >= self.max_rank),
                "enforce_eager": device.type == "cpu",
                "disable_log_stats": True,
            } | self.options
            if device.type != "cpu":  # beside the model's own weights
                given.setdefault("gpu_memory_utilization", 0.45)
            with _undisturbed():
                try:
                    self._engine = vllm.LLM(model=str(self._folder / "model"), **given)
                except Exception as error:
                    name = self.lm.transformer.config.model_type
                    raise ValueError(f"vLLM does not start with this model ({name}): {error}") from error
        except BaseException:
            self._stop()
            raise
        self._weights = self.lm.weights_version()
        self.lm.engine = self
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def _stop(self) -> None:
        self.lm.engine = None
        if self._engine is not None:
            self._engine = None
            gc.collect()
            importlib.import_module("vllm.distributed").cleanup_dist_env_and_memory()
        self._loaded.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write_model(self) -> None:
        from safetensors.torch import save_file

        folder = self._folder / "model"
        self.lm.transformer.config.save_pretrained(folder)
        described = json.loads((folder / "config.json").read_text())
        described["architectures"] = [type(self.lm.transformer).__name__]
        (folder / "config.json").write_text(json.dumps(described))
        weights = {
            name.replace(".base_layer.", "."): weight.detach().cpu().contiguous()
            for name, weight in self.lm.transformer.named_parameters()
            if "lora_" not in name
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    # --- drawing -----------------------------------------------------------------------------------

    def draws(
        self, law: TextLaw, contexts: Sequence[Sequence[int]], adapter: str | None, heat: Tensor | None = None
    ) -> bool:
        """Whether texts of this law are drawn here."""
        known = self.lm.vocabulary
        coldest = law.temperature * (1.0 if heat is None else float(heat.min()))
        return (
            coldest >= COLDEST
            and law.grammar is None
            and (law.automaton is None or law.min_tokens <= 1)
            and all(0 <= token < known for row in set(map(tuple, contexts)) for token in row)
            and (adapter is None or self._takes(adapter))
        )

    def _takes(self, adapter: str) -> bool:
        parameters = self.lm.adapters.parameters(adapter)
        return "virtual_tokens" not in parameters and self.lm.adapters.made(adapter)[0] <= self.max_rank

    def draw(
        self, law: TextLaw, contexts: Sequence[Sequence[int]], adapter: str | None, heat: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One text for each context.

        :param contexts: ``N`` token lists, none empty.
        :param heat: ``(N,)``, an extra temperature to draw at.
        :returns: texts ``(N, max_tokens)``, and vLLM's log-probability of each, ``(N,)``, nats.
        """
        if self.lm.weights_version() != self._weights:
            raise ValueError(
                "the model's own weights have changed since VLLM was started, and vLLM has a copy. Leave its block and "
                "enter it anew."
            )
        vllm = _vllm()
        shared: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": 0}
        shared |= {"max_tokens": law.max_tokens, "ignore_eos": True, "detokenize": False}
        if law.automaton is None and len(law.stop):
            # Ours counts the stop token, vLLM's does not.
            shared |= {"stop_token_ids": law.stop.tolist(), "min_tokens": max(law.min_tokens - 1, 0)}
        width = self.lm.transformer.get_output_embeddings().weight.shape[0]
        if law.allowed is not None:
            shared["allowed_token_ids"] = law.allowed.nonzero()[:, 0].tolist()
        elif width > law.vocabulary:
            shared["allowed_token_ids"] = list(range(law.vocabulary))
        seeds = torch.randint(2**31 - 1, (len(contexts),)).tolist()
        heats = [1.0] * len(contexts) if heat is None else heat.tolist()
        asked = [
            vllm.SamplingParams(seed=seed, temperature=law.temperature * own, **shared)
            for seed, own in zip(seeds, heats, strict=True)
        ]
        prompts = [{"prompt_token_ids": list(context)} for context in contexts]
        with _undisturbed():
            found = self._engine.generate(prompts, asked, use_tqdm=False, lora_request=self._request(adapter))
        rows = [result.outputs[0] for result in found]
        texts = torch.full((len(rows), law.max_tokens or 0), PAD, dtype=torch.long)
        scores = torch.zeros(texts.shape)
        for n, row in enumerate(rows):
            tokens = list(row.token_ids)
            texts[n, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            told = [place[token].logprob for place, token in zip(row.logprobs, tokens, strict=True)]
            scores[n, : len(tokens)] = torch.tensor(told)
        if law.automaton is not None:  # vLLM does not know where it ends
            texts = texts.to(law.stop.device)
            ended = law.ended(texts)
            behind = torch.nn.functional.pad(ended, (1, 0))[:, :-1]
            texts, scores = texts.masked_fill(behind, PAD), scores.masked_fill(behind.cpu(), 0.0)
        self.drawn += len(texts)
        return texts.to(self.lm.device), scores.sum(-1).to(self.lm.device)

    def _request(self, adapter: str | None) -> Any:
        """vLLM's name of an adapter with its present weights."""
        if adapter is None:
            return None
        version, known = self.lm.version(adapter), self._loaded.get(adapter)
        if known is None or known.version != version:
            self._number += 1
            folder = self._folder / f"adapter-{self._number}"
            self._write_adapter(adapter, folder)
            if known is not None:
                self._engine.llm_engine.remove_lora(known.number)
                shutil.rmtree(known.folder)
            known = self._loaded[adapter] = _Loaded(version, self._number, folder)
        request: Any = importlib.import_module("vllm.lora.request")
        return request.LoRARequest(f"{adapter}-{known.number}", known.number, str(known.folder))

    def _write_adapter(self, adapter: str, folder: Path) -> None:
        from safetensors.torch import save_file

        rank, alpha, _ = self.lm.adapters.made(adapter)
        parameters = self.lm.adapters.parameters(adapter)
        places = {name.split(".lora_")[0].removesuffix(".base_layer") for name in parameters}
        folder.mkdir()
        described = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({place.rsplit(".", 1)[-1] for place in places}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(described))
        weights = {f"base_model.model.{key}": value.detach().cpu().contiguous() for key, value in parameters.items()}
        save_file(weights, folder / "adapter_model.safetensors")

    def __repr__(self) -> str:
        state = "on" if self._engine is not None else "off"
        return f"VLLM({state}, {self.drawn} texts drawn, {self.left} left to the model's own network, {self.drift!r})"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds every generator of the process, and sets torch's threads."""
    threads = torch.get_num_threads()
    try:
        with randomness_kept():
            yield
    finally:
        torch.set_num_threads(threads)


def _vllm() -> Any:
    """vLLM, told to run in this process and to report nothing.

    :raises ImportError: it is not installed, or does not load.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise ImportError("VLLM needs vLLM: pip install 'pyro-llmppl[vllm]'.") from error
        raise ImportError(f"vLLM is installed but does not load: {error}") from error
