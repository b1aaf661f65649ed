"""What somebody wants, and answers that lead somewhere: calibration of intents, diversity of replies.

    python benchmarks/intents.py

24 short messages to a shop with their intents, written for this benchmark; every other one is learned from, the rest
tested. The classifier is the noisy channel of ``llmppl.models.dialogue``, exact by enumeration: as it is, and after the
language model has learned, by its adapter, what somebody with an intent says (maximum likelihood, the intent observed).
Replies are compared for four messages with what is said next: eight of the posterior, drawn by a prompt and resampled
by their weights, against greedy decoding, nucleus sampling and a beam, by their mean log-joint with message and next
turn, and by the share of word pairs that are distinct among eight.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pyro
import torch
from application_programs import INTENTS, TALKS, asked_to_reply
from measure import machine, nothing, table
from pyro import poutine
from pyro.infer import Trace_ELBO

from llmppl import LM, decode, exact_posterior, fit, importance
from llmppl.guides import PromptGuide
from llmppl.models import dialogue

BACK, WHERE, ADDRESS, ADVICE = range(4)
MESSAGES = [
    ("The shoes are too small for me.", BACK),
    ("This lamp arrived broken.", BACK),
    ("I do not like the colour, can I get my money back?", BACK),
    ("The shirt has a hole in it.", BACK),
    ("You sent me the wrong book.", BACK),
    ("The jacket does not fit my son.", BACK),
    ("It has been ten days and nothing has come.", WHERE),
    ("When will my parcel arrive?", WHERE),
    ("The parcel was due on Monday.", WHERE),
    ("Has my order been sent yet?", WHERE),
    ("I am still waiting for the chair.", WHERE),
    ("How long does the delivery take from here?", WHERE),
    ("I am moving to another town next week.", ADDRESS),
    ("Please deliver it to my office instead.", ADDRESS),
    ("We have a new house, so please send it there.", ADDRESS),
    ("I wrote the wrong street number.", ADDRESS),
    ("Can the parcel go to my neighbour at number twelve?", ADDRESS),
    ("The postcode in my account is old.", ADDRESS),
    ("My sister likes painting, what could I give her?", ADVICE),
    ("Which of these phones is better?", ADVICE),
    ("I need a present for a boy of six.", ADVICE),
    ("What kind of tea would you drink in the evening?", ADVICE),
    ("Is the red bicycle good for a beginner?", ADVICE),
    ("I am looking for a warm coat for the winter.", ADVICE),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=48, help="of each posterior over replies")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    lm = LM.from_pretrained("smollm2-135m")
    learned_from, tested = MESSAGES[::2], MESSAGES[1::2]
    rows = [["as it is", *scores(intents(dialogue(lm, INTENTS, replies=0), tested), tested)]]
    theta = lm.adapt(rank=8, seed=0)
    program = dialogue(theta, INTENTS, replies=0)

    def known(message: str, intent: int) -> None:
        with poutine.condition(data={"intent": theta.encode(INTENTS[intent])}):
            program(message)

    fit(known, nothing, learned_from, Trace_ELBO(), options.steps, batch_size=4, model_learning_rate=5e-4, seed=0)
    rows.append(["learned from 12", *scores(intents(program, tested), tested)])
    print(table(["channel", "% right", "log p of the intent, nats", "ECE, %"], rows), flush=True)
    print(table(["replies", "mean log-joint, nats", "distinct word pairs", "an example"], replies(lm, options.samples)))


def intents(program: Any, messages: list[tuple[str, int]]) -> np.ndarray:
    """Posterior probabilities of the intents, a row for each message."""
    found = []
    for message, _ in messages:
        posterior = exact_posterior(program)(message)
        by_name = dict(zip(posterior.decode("intent"), posterior.weights, strict=True))
        found.append([by_name[intent] for intent in INTENTS])
    return np.array(found)


def scores(probabilities: np.ndarray, messages: list[tuple[str, int]], bins: int = 5) -> list[float]:
    truth = np.array([intent for _, intent in messages])
    right, confidence = probabilities.argmax(1) == truth, probabilities.max(1)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        (place == n).mean() * abs(right[place == n].mean() - confidence[place == n].mean())
        for n in range(bins)
        if (place == n).any()
    ]
    log_p = np.log(probabilities[np.arange(len(truth)), truth])
    return [100 * float(right.mean()), float(log_p.mean()), 100 * float(sum(gaps))]


def replies(lm: LM, samples: int, wanted: int = 8) -> list[list[Any]]:
    program = dialogue(lm, INTENTS, max_tokens=20)
    guide = PromptGuide(program, lm, prompt=asked_to_reply(lm))
    makers = {
        "posterior": lambda: lambda *args: importance(program, guide, samples, progress=False)(*args).resample(wanted),
        "nucleus, top 0.9": lambda: decode(program, guide, "nucleus", wanted, top_p=0.9, progress=False),
        "greedy": lambda: decode(program, guide, "greedy", progress=False),
        "beam of 4": lambda: decode(program, guide, "beam", num_beams=4, progress=False),
    }
    rows = []
    for name, make in makers.items():
        joint, distinct, example = [], [], ""
        for n, (message, following) in enumerate(TALKS[:4]):
            pyro.set_rng_seed(n)
            found = make()(message, following)
            texts = [str(one[0] if isinstance(one, list) else one) for one in found.decode("reply")]
            pairs = [pair for text in texts for pair in zip(text.split(), text.split()[1:], strict=False)]
            joint.append(float(found.log_joint.mean()))
            distinct.append(len(set(pairs)) / max(len(pairs), 1) if len(texts) > 1 else float("nan"))
            example = texts[0].strip()
        rows.append([name, float(np.mean(joint)), float(np.mean(distinct)), example])
    return rows


if __name__ == "__main__":
    main()
