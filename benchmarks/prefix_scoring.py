"""(a) The joint at every prefix of sampled texts: one forward pass a prefix against the prefix tree.

    python benchmarks/prefix_scoring.py

For each prefix z_{1:t} of each text, closed by a stop token, log p(z_{1:t} ⊤ | prompt) + log p(suffix |
prompt, z_{1:t} ⊤). The straightforward way runs a batch for each t, with the prompt in every row; it is
given the logits of text and suffix only. Two limits: the ratio of tokens read; and that of multiplications,
which counts the vocabulary's layer where it is needed (nearly everywhere in the tree, not at the repeated
prompts). Prints CPU seconds, medians of one run, float32, one thread.
"""

from __future__ import annotations

import argparse

import torch
from measure import cpu_seconds, machine, table

from llmppl import LM
from llmppl.network.scoring import Request, score
from llmppl.network.text_law import TextLaw
from llmppl.text.trie import Trie

SHAPES = [  # prompt, text, suffix, batch
    (30, 20, 12, 8),
    (30, 20, 4, 8),
    (120, 20, 12, 4),
    (30, 20, 12, 1),
    (10, 4, 4, 1),
    (60, 16, 12, 16),
]


@torch.no_grad()
def naive(lm: LM, prompt: list[int], texts: torch.Tensor, suffix: list[int], stop: int) -> torch.Tensor:
    """``(T, B)``: a forward pass for each prefix length."""
    results = []
    for t in range(1, texts.shape[1] + 1):
        tail = torch.tensor([stop, *suffix]).expand(len(texts), -1)
        ids = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts[:, :t], tail], -1)
        count = t + 1 + len(suffix)
        logits = lm.transformer(input_ids=ids[:, :-1], logits_to_keep=count, use_cache=False).logits
        scores = logits.log_softmax(-1).gather(-1, ids[:, -count:, None])[..., 0]
        results.append(scores.sum(-1))
    return torch.stack(results)


def requests(lm: LM, prompt: list[int], texts: torch.Tensor, suffix: list[int], stop: int) -> list[Request]:
    rows = [[*text[:t], stop] for t in range(1, texts.shape[1] + 1) for text in texts.tolist()]
    law = TextLaw(lm.vocabulary, None, 0, torch.empty(0, dtype=torch.long))
    return [
        Request(law, [prompt] * len(rows), rows, texts.shape[1] + 1),
        Request(law, [[*prompt, *row] for row in rows], [suffix] * len(rows), len(suffix)),
    ]


@torch.no_grad()
def packed(lm: LM, prompt: list[int], texts: torch.Tensor, suffix: list[int], stop: int) -> torch.Tensor:
    prior, likelihood = score(lm.network, requests(lm, prompt, texts, suffix, stop))
    return (prior.sum(-1) + likelihood.sum(-1)).reshape(texts.shape[1], len(texts))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lm = LM.from_pretrained("smollm2-135m")
    print(machine(), flush=True)
    head = lm.transformer.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for p in lm.transformer.base_model.parameters()) - head  # the embeddings are the head's
    rows = []
    for prompt_size, text_size, suffix_size, batch in SHAPES[: options.shapes]:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(1000, 40000, (prompt_size,), generator=generator).tolist()
        texts = torch.randint(1000, 40000, (batch, text_size), generator=generator)
        suffix = torch.randint(1000, 40000, (suffix_size,), generator=generator).tolist()
        given = (lm, prompt, texts, suffix, 30)
        error = float((naive(*given) - packed(*given)).abs().max())
        seconds = cpu_seconds({"naive": lambda g=given: naive(*g), "ours": lambda g=given: packed(*g)}, options.repeats)
        read = sum(batch * (prompt_size + t + suffix_size) for t in range(1, text_size + 1))
        ours = requests(*given)
        nodes = len(Trie.of([[*c, *t[:-1]] for r in ours for c, t in zip(r.contexts, r.texts, strict=True)]))
        ratio, limit = seconds["naive"] / seconds["ours"], read / nodes
        predicted = sum(batch * (t + 1 + suffix_size) for t in range(1, text_size + 1))
        work = (read * trunk + predicted * head) / (nodes * trunk + (nodes - prompt_size + 1) * head)
        shape = f"{prompt_size}/{text_size}/{suffix_size}/{batch}"
        shares = (limit, f"{ratio / limit:.0%}", work, f"{ratio / work:.0%}")
        rows.append((shape, read, nodes, seconds["naive"], seconds["ours"], ratio, *shares, error))
        print(rows[-1], flush=True)
    header = ("prompt/text/suffix/batch", "tokens naive", "ours", "s naive", "s ours", "ratio")
    limits = ("token limit", "share", "work limit", "share", "largest difference, nats")
    print("\n" + table((*header, *limits), rows))


if __name__ == "__main__":
    main()
