"""(l) The compiled JAX path against torch eager: scoring, sampling, the gradient of a LoRA guide.

    taskset -c 0 python benchmarks/jax_against_torch.py

The same weights, float32, one thread, CPU seconds of one run, contenders in turns, medians; in each turn a contender
runs twice and the second is measured, as in a loop of such steps. Sixteen texts of 20 tokens after a prompt of 40
tokens that they share.

- **scoring**: log p of the texts. Torch eager is one pass of the transformer over the padded batch with the logits of
  the text's positions; llmppl (torch) and JAX read the prompt once.
- **sampling**: texts with their log-probabilities. Torch eager is ``generate`` with its cache and each
  step's logits.
- **gradient**: log q of the texts under a LoRA adapter of rank 16 and its gradient, the pass that training repeats.
  Torch eager is the padded batch through peft's layers and ``backward``.

Compilation is timed apart, once, in wall-clock seconds; the targets are ratios of CPU seconds to torch eager.
"""

from __future__ import annotations

import os

# Before jax starts: one thread, as torch has.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from measure import cpu_seconds, machine, table

import llmppl
from llmppl.distributions import AutoregressiveText
from llmppl.guides import AutoregressiveGuide
from llmppl.models import continuation
from llmppl.numpyro import LM
from llmppl.numpyro import guides as jax_guides
from llmppl.numpyro import models as jax_models
from llmppl.numpyro.network.lifting import bound, compiler_options

TARGETS = {"scoring": 0.50, "sampling": 0.62, "gradient": 0.48}
COMPILE = 7.0


class Torch:
    """Torch eager, and llmppl on torch."""

    def __init__(self, prompt: np.ndarray, texts: np.ndarray) -> None:
        self.lm = llmppl.LM.from_pretrained("smollm2-135m")
        self.prompt, self.texts = torch.tensor(prompt).long(), torch.tensor(texts).long()
        self.ids = torch.cat([self.prompt.expand(len(texts), -1), self.texts], -1)
        self.law = self.lm("x", max_tokens=texts.shape[-1]).law
        self.guide = AutoregressiveGuide(continuation(self.lm), self.lm, seed=0)

    def plain_log_probs(self) -> torch.Tensor:
        length = self.texts.shape[-1]
        logits = self.lm.transformer(input_ids=self.ids[:, :-1], logits_to_keep=length).logits
        return logits.float().log_softmax(-1).gather(-1, self.texts[..., None])[..., 0].sum(-1)

    @torch.no_grad()
    def scoring(self) -> torch.Tensor:
        return self.plain_log_probs()

    @torch.no_grad()
    def own_scoring(self) -> torch.Tensor:
        return AutoregressiveText(self.lm, self.prompt, self.law).log_prob(self.texts)

    @torch.no_grad()
    def sampling(self) -> object:
        ids, length = self.ids[:, : len(self.prompt)], self.texts.shape[-1]
        output = self.lm.transformer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length,
            max_new_tokens=length,
            return_dict_in_generate=True,
            output_logits=True,
            pad_token_id=0,
        )
        drawn = output.sequences[:, len(self.prompt) :]
        return [
            step.float().log_softmax(-1).gather(-1, drawn[:, t, None]).sum() for t, step in enumerate(output.logits)
        ]

    @torch.no_grad()
    def own_sampling(self) -> object:
        return AutoregressiveText(self.lm, self.prompt, self.law).sample_with_log_prob((len(self.texts),))

    def gradient(self) -> object:
        with self.lm.using(self.guide.adapter):
            self.plain_log_probs().sum().backward()
        return self._gradients()

    def own_gradient(self) -> object:
        AutoregressiveText(self.lm, self.prompt, self.law, self.guide.adapter).log_prob(self.texts).sum().backward()
        return self._gradients()

    def _gradients(self) -> dict[str, torch.Tensor | None]:
        found = {name: p.grad for name, p in self.guide.weights.items()}
        for parameter in self.guide.weights.values():
            parameter.grad = None
        return found


class Jax:
    """llmppl on JAX, compiled."""

    def __init__(self, prompt: np.ndarray, texts: np.ndarray, adapter: Any) -> None:
        self.lm = LM.from_pretrained("smollm2-135m")
        self.texts = jnp.asarray(texts)
        self.text = self.lm(prompt, max_tokens=texts.shape[-1])
        guide = jax_guides.AutoregressiveGuide(jax_models.continuation(self.lm), self.lm)
        guide.load(adapter)
        self.weights, self.guide = guide.weights, guide
        self.key = jax.random.key(0)
        count = len(texts)

        def log_q(weights: Any, frozen: Any, context: Any, values: Any) -> Any:
            guide.weights = weights
            try:
                with bound((self.lm,), (frozen,)):
                    text = self.lm(*context, max_tokens=texts.shape[-1])
                    return text.with_context(text.context, guide.register()._additions).log_prob(values).sum()
            finally:
                guide.weights = self.weights

        self.compiled: dict[str, Callable[..., Any]] = {
            "scoring": jax.jit(lambda text, values: text.log_prob(values)),
            "sampling": jax.jit(lambda text, key: text.draw(key, (count,))),
            "gradient": jax.jit(jax.grad(log_q)),
        }
        self.arguments = {
            "scoring": (self.text, self.texts),
            "sampling": (self.text, self.key),
            "gradient": (self.weights, self.lm.weights, self.text.context, self.texts),
        }

    def compile(self) -> dict[str, float]:
        """Wall-clock seconds of tracing and compiling each."""
        seconds = {}
        for name, function in self.compiled.items():
            start = time.perf_counter()
            self.compiled[name] = function.lower(*self.arguments[name]).compile(compiler_options())  # type: ignore[attr-defined]
            seconds[name] = time.perf_counter() - start
        return seconds

    def run(self, name: str) -> Any:
        return jax.block_until_ready(self.compiled[name](*self.arguments[name]))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--prompt", type=int, default=40, help="tokens")
    arguments.add_argument("--texts", type=int, default=16)
    arguments.add_argument("--tokens", type=int, default=20)
    arguments.add_argument(
        "--cold", action="store_true", help="measure each run right after another contender's, not after its own"
    )
    options = arguments.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    prompt = generator.integers(1000, 40000, options.prompt, dtype=np.int32)
    texts = generator.integers(1000, 40000, (options.texts, options.tokens), dtype=np.int32)
    eager = Torch(prompt, texts)
    # The same adapter on both sides, off the identity, so that the gradients of both its factors can be compared.
    with torch.no_grad():
        for name, parameter in eager.guide.weights.items():
            if "lora_B" in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    folder = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"jax_against_torch_{os.getpid()}.safetensors")
    eager.guide.save(folder)
    ours = Jax(prompt, texts, folder)
    os.unlink(folder)
    print(f"{machine()}, jax {jax.__version__}", flush=True)
    compiling = ours.compile()
    difference = abs(np.asarray(ours.run("scoring")) - eager.scoring().numpy()).max()
    print(f"largest difference of log p over {options.texts} texts: {difference:.1e} nats")
    print(f"largest relative difference of a gradient: {_largest_difference(eager, ours):.1e}", flush=True)
    rows = []
    for name, target in TARGETS.items():
        contenders = {
            "torch eager": getattr(eager, name),
            "llmppl on torch": getattr(eager, f"own_{name}"),
            "llmppl on JAX": lambda name=name: ours.run(name),
        }
        cpu_seconds(contenders, 1)  # warms up
        seconds = cpu_seconds(contenders, options.repeats, warm=not options.cold)
        ratios = [seconds["llmppl on JAX"] / seconds[other] for other in ("torch eager", "llmppl on torch")]
        rows.append([name, *(f"{s:.2f}" for s in seconds.values()), f"{ratios[0]:.2f}", f"{target:.2f}"])
        rows[-1] += [f"{ratios[1]:.2f}", f"{compiling[name]:.1f}"]
        print(rows[-1], flush=True)
    header = ["", "torch eager, CPU s", "llmppl on torch", "llmppl on JAX", "JAX / eager", "target"]
    print("\n" + table([*header, "JAX / llmppl on torch", f"compiling, s (target {COMPILE:.0f})"], rows))


def _largest_difference(eager: Torch, ours: Jax) -> float:
    """Of the adapter's gradients, each relative to the largest number of its matrix."""
    reference = eager.gradient()
    weights = ours.run("gradient")
    ours.guide.weights, kept = weights, ours.guide.weights
    tensors = ours.guide.tensors()
    ours.guide.weights = kept
    worst = 0.0
    for name, gradient in reference.items():  # type: ignore[attr-defined]
        found = np.asarray(tensors[name.replace("/", ".")])
        worst = max(worst, float(abs(found - gradient.numpy()).max() / abs(gradient.numpy()).max()))
    return worst


if __name__ == "__main__":
    main()
