"""Importance sampling by a test-time engine, for ``against_engines.py``: runs in the engine's environment.

    python engine_worker.py {genlm-control|llamppl} MODEL_FOLDER

Reads one JSON request a line from standard input and answers each with one JSON line. A request is
``{"beginning": text, "ending": token ids, "prompt": token ids or null, "stop": token ids, "max_tokens": T,
"num_samples": K, "seed": int}``; the answer holds the log-weights in nats, the token ids of the middles and the
CPU seconds. With ``"keyword": word`` in place of the ending the observation is that one of the middle's content words,
drawn uniformly, is this one, and ``"temperature"`` is that of the middle. With ``"regex"`` in place of the ending the
middle is a line that matches it, by genlm-control's adaptive weighted rejection sampling, resampled where the effective
sample size is below half. Needs the engine alone, not llmppl, whose list of words it reads as a file.

Both engines get what their users would give them: the beginning's key-value cache is kept, as many queries a batch
as there are particles, and the ending's probabilities come from one query for each middle, not one for each token.
No resampling (``ess_threshold=0``), so this is plain importance sampling.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import sys
import warnings
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Request = dict[str, Any]
Particles = tuple[list[float], list[list[int]]]
"""Log-weights and middles."""


def genlm_control(folder: str) -> Callable[[Request], Awaitable[Particles]]:
    """The middle is sampled by ``DirectTokenSampler``, a critic weighs the ending; a proposal is another prompt."""
    from genlm.control import AWRS, SMC, BoolFSA, Potential, PromptedLLM, direct_token_sampler

    # A text may hold the model's end token, and does not end there. The engine wants one all the same: the least
    # probable token, below e^-20 after a story.
    unused = b"<filename>"
    base = PromptedLLM.from_name(folder, backend="hf", eos_byte_strings=[unused], hf_opts={"dtype": torch.float32})

    class Observation(Potential):  # type: ignore[misc]
        """log p(ending | beginning, middle), or log p(keyword | middle), of a complete middle."""

        def __init__(self, llm: Any, request: Request) -> None:
            super().__init__(llm.vocab, tables=llm.tables)
            self.llm, self.request = llm, request

        def is_terminal_only(self) -> bool:
            return True

        async def prefix(self, context: list[Any]) -> float:
            return 0.0

        async def complete(self, context: list[Any]) -> float:
            middle = self.llm.encode_tokens(context)
            if "keyword" in self.request:
                return keyword_log_prob(self.llm.model.tokenizer.decode(middle), self.request["keyword"])
            read = self.llm.prompt_ids + middle
            return await ending_log_prob(self.llm.model.next_token_logprobs, read, self.request["ending"])

    async def sample(request: Request) -> Particles:
        base.model.batch_size = request["num_samples"]
        base.temperature = request.get("temperature", 1.0)
        llm = base.spawn(prompt_ids=base.model.tokenizer.encode(request["beginning"]))
        if "regex" in request:
            llm = llm.spawn_new_eos([b"\n"])
            line = BoolFSA.from_regex(request["regex"]).coerce(llm, f=b"".join)
            sequences = await SMC(AWRS(llm, line, seed=request["seed"]))(
                n_particles=request["num_samples"], ess_threshold=0.5, max_tokens=request["max_tokens"]
            )
            # Their last token is the end, which is the line's.
            return list(sequences.log_weights), [
                llm.encode_tokens(c[:-1]) + llm.model.tokenizer.encode("\n") for c in sequences.contexts
            ]
        proposal = None
        base.model.cache_kv(llm.prompt_ids)
        if request["prompt"] is not None:
            proposal = base.spawn(prompt_ids=request["prompt"])
            base.model.batch_size *= 2
            # genlm-backend 0.3.1 takes two queries of a batch for one if the tokens behind their cached prompts are
            # equal: the weights were wrong by nats. With a token left out of the cache they never are.
            base.model.cache_kv(request["prompt"][:-1])
        stop, most = set(request["stop"]), request["max_tokens"]
        smc = SMC(direct_token_sampler(llm, proposal), critic=Observation(llm, request))
        sequences = await smc(
            n_particles=request["num_samples"],
            ess_threshold=0,
            max_tokens=most + 2,
            terminate_when=lambda context: len(context) >= most or context[-1].token_id in stop,
        )
        base.model.clear_cache()
        return list(sequences.log_weights), [llm.encode_tokens(context[:-1]) for context in sequences.contexts]

    return sample


def llamppl(folder: str) -> Callable[[Request], Awaitable[Particles]]:
    """A ``Model`` that samples the middle token by token and observes the ending."""
    from llamppl import CachedCausalLM, LMContext, Model, smc_standard

    lm = CachedCausalLM.from_pretrained(folder, backend="hf", hf_opts={"dtype": torch.float32})

    class Infilling(Model):  # type: ignore[misc]
        def __init__(self, context: Any, request: Request) -> None:
            super().__init__()
            self.context, self.request, self.middle = context, request, list[int]()

        def immutable_properties(self) -> set[str]:
            return {"request"}

        async def step(self) -> None:
            token = await self.sample(self.context.next_token())
            self.middle.append(int(token.token_id))
            ended = len(self.middle) == self.request["max_tokens"] or self.middle[-1] in self.request["stop"]
            if ended and "keyword" in self.request:
                self.score(keyword_log_prob(lm.tokenizer.decode(self.middle), self.request["keyword"]))
                self.finish()
            elif ended:
                await lm.next_token_logprobs([*self.context.tokens, *self.request["ending"]])
                for observed in self.request["ending"]:
                    await self.observe(self.context.next_token(), observed)
                self.finish()

    async def sample(request: Request) -> Particles:
        if request["prompt"] is not None:
            raise ValueError("LLaMPPL runs with the prior as its proposal here.")
        lm.model.batch_size = request["num_samples"]
        lm.cache_kv(lm.tokenizer.encode(request["beginning"]))
        context = await LMContext.create(lm, request["beginning"], temp=request.get("temperature", 1.0))
        request = {**request, "stop": set(request["stop"])}
        particles = await smc_standard(Infilling(context, request), request["num_samples"], ess_threshold=0)
        lm.clear_cache()
        return [float(p.weight) for p in particles], [p.middle for p in particles]

    return sample


def keyword_log_prob(text: str, keyword: str) -> float:
    """Of one of the text's content words, each as probable."""
    own = WORDS.content_words(text)
    return -math.log(len(own)) if keyword in own else -math.inf


def words() -> Any:
    """llmppl's words, of which a file of its own knows all."""
    path = Path(__file__).parent.parent / "llmppl" / "text" / "words.py"
    spec = importlib.util.spec_from_file_location("words", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORDS = words()


async def ending_log_prob(
    query: Callable[[list[int]], Awaitable[torch.Tensor]], read: list[int], ending: list[int]
) -> float:
    """The first query answers the others, which find their answer in the engine's cache."""
    await query([*read, *ending[:-1]])
    return sum([float((await query([*read, *ending[:n]]))[token]) for n, token in enumerate(ending)])


ENGINES = {"genlm-control": genlm_control, "llamppl": llamppl}


def main() -> None:
    name, folder = sys.argv[1:]
    # Whatever the engine prints goes elsewhere: standard output is for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    np.seterr(divide="ignore")  # log(ess_threshold), which is zero
    sample = ENGINES[name](folder)
    versions = {package: version(package) for package in (name, "genlm-backend", "transformers", "torch")}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(request["seed"])
        # The generator that LLaMPPL draws from.
        np.random.seed(request["seed"])  # noqa: NPY002
        start = os.times()
        log_weights, middles = asyncio.run(sample(request))
        seconds = sum(os.times()[:4]) - sum(start[:4])
        answer = {"log_weights": list(map(float, log_weights)), "middles": middles, "cpu_seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
