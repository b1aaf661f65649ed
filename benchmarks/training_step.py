"""(d) A SubTB training step against a straightforward implementation of the paper's method.

    python benchmarks/training_step.py

Story infilling: p(text | prompt) p(suffix | prompt, text), a LoRA guide, one optimizer step. The
straightforward way, as a reader of Hu et al. (2024) would write it with transformers: particles repeat
the prompt; the guide's text is drawn with a key-value cache and scored with gradients in one batch; the
reward of every prefix is a batch of its own. Both use the same weights, adapter, loss and optimizer.
Prints CPU seconds of one run, one thread, float32.
"""

from __future__ import annotations

import argparse

import pyro
import torch
from measure import cpu_seconds, machine, table
from torch import Tensor
from transformers import DynamicCache

from llmppl import LM
from llmppl.guides import AutoregressiveGuide
from llmppl.objectives import SubTrajectoryBalance

STOP = 45000  # a token that is never drawn here, so that every text has full length


@torch.no_grad()
def draw(transformer: torch.nn.Module, prompt: Tensor, particles: int, tokens: int) -> Tensor:
    ids, cache, drawn = prompt.expand(particles, -1), DynamicCache(), []
    for _ in range(tokens):
        logits = transformer(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
        ids = torch.multinomial(logits.softmax(-1), 1)
        drawn.append(ids)
    return torch.cat(drawn, -1)


def straightforward(
    lm: LM, guide: AutoregressiveGuide, prompt: Tensor, suffix: Tensor, options: argparse.Namespace
) -> Tensor:
    """The loss of eq. 3 with λ = 1."""
    count, length = options.particles, options.text
    told = torch.cat([suffix, prompt])
    with lm.using(guide.adapter):
        texts = draw(lm.transformer, told, count, length)
        ids = torch.cat([told.expand(count, -1), texts], -1)
        log_q = lm.transformer(input_ids=ids).logits[:, len(told) - 1 :].log_softmax(-1)
    forward = log_q[:, :-1].gather(-1, texts[..., None])[..., 0]  # (B, T)
    # A text of full length ends by itself.
    ends = torch.cat([log_q[:, :-1, STOP], torch.zeros(count, 1)], -1)
    rewards = []
    with torch.no_grad():
        for t in range(length + 1):
            stop = [torch.full((count, 1), STOP)] if t < length else []
            ids = torch.cat([prompt.expand(count, -1), texts[:, :t], *stop, suffix.expand(count, -1)], -1)
            scores = lm.transformer(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            rewards.append(scores[:, len(prompt) - 1 :].sum(-1))
    reward = torch.stack(rewards, -1)  # (B, T + 1)
    before = torch.nn.functional.pad(forward.cumsum(-1), (1, 0))
    loss, pairs = torch.zeros(()), 0
    for i in range(length):
        for j in range(i + 1, length + 1):
            flow = reward[:, i] + before[:, j] - before[:, i] + ends[:, j] - reward[:, j] - ends[:, i]
            loss, pairs = loss + flow.square().mean(), pairs + 1
    return loss / pairs


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--prompt", type=int, default=60)
    arguments.add_argument("--text", type=int, default=16)
    arguments.add_argument("--suffix", type=int, default=12)
    arguments.add_argument("--particles", type=int, default=16)
    arguments.add_argument("--repeats", type=int, default=3)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    print(machine(), flush=True)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1000, 40000, (options.prompt,), generator=generator)
    suffix = torch.randint(1000, 40000, (options.suffix,), generator=generator)

    def story() -> None:
        text = pyro.sample("text", lm(prompt, max_tokens=options.text, stop=STOP))
        pyro.sample("suffix", lm(prompt, text), obs=suffix)

    guide = AutoregressiveGuide(story, lm, rank=16, seed=0)
    optimizer = torch.optim.AdamW(guide.parameters(), lr=1e-5)
    objective = SubTrajectoryBalance(options.particles)
    losses: dict[str, list[float]] = {"naive": [], "ours": []}

    def step(name: str) -> None:
        optimizer.zero_grad()
        if name == "ours":
            losses[name].append(objective.loss_and_grads(story, guide))
        else:
            loss = straightforward(lm, guide, prompt, suffix, options)
            loss.backward()
            losses[name].append(loss.item())
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 1.0)
        optimizer.step()

    step("ours")  # checks, once, that the joint may be taken at prefixes
    seconds = cpu_seconds({"naive": lambda: step("naive"), "ours": lambda: step("ours")}, options.repeats)
    shape = f"{options.prompt}/{options.text}/{options.suffix}/{options.particles}"
    mean = {name: sum(values) / len(values) for name, values in losses.items()}
    row = (shape, seconds["naive"], seconds["ours"], seconds["naive"] / seconds["ours"], mean["naive"], mean["ours"])
    header = ("prompt/text/suffix/particles", "s straightforward", "s ours", "ratio", "mean loss", "mean loss, ours")
    print("\n" + table(header, [row]))


if __name__ == "__main__":
    main()
