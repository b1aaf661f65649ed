"""Train the adapter that ships with the demo.

    python benchmarks/train_adapter.py runs/adapter --steps 200

The demo's program and guide, trained longer: trajectory balance (VarGrad) with tempered, replayed and
simulated particles; the replay buffer is seeded with the sentence that each training story had and,
where it fits, with its ending, which is a likely middle for this model. The held-out stories are the
demo's and are never trained on. Killed, it goes on where it was when called again.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import resources
from pathlib import Path

import torch

from llmppl import LM, Behaviour, Evaluation, ReplayBuffer, fit
from llmppl.demo import infilling as demo
from llmppl.models import infilling
from llmppl.objectives import TrajectoryBalance


def seeded(story: object, lm: LM, data: list[tuple[str, str]]) -> ReplayBuffer:
    """The sentences that were left out, and the endings themselves."""
    lines = resources.files("llmppl.demo").joinpath("stories.jsonl").read_text(encoding="utf-8").splitlines()
    fourth = [" " + json.loads(line)["sentences"][3] for line in lines]
    buffer = ReplayBuffer(capacity=32, priority="log_weight")
    for (beginning, ending), sentence in zip(data, fourth, strict=False):
        texts = [t for t in (sentence, ending) if len(lm.encode(t)) <= 16 and t.count(".") == 1]
        if texts:
            buffer.seed(story, (beginning, ending), middle=texts)
    return buffer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=Path, help="for checkpoints and the adapter")
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--threads", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    lm = LM.from_pretrained("smollm2-135m")
    story = infilling(lm)
    training, held = demo.split(demo.stories(), demo.HELD_OUT)
    guide = demo.make_guide(story, lm, seed=0)
    behaviour = Behaviour(
        tempered=0.25, replayed=0.25, sleep=0.1, temperatures=(0.8, 1.5), buffer=seeded(story, lm, training)
    )
    start = time.process_time()
    history = fit(
        story,
        guide,
        training,
        TrajectoryBalance(demo.PARTICLES, behaviour=behaviour),
        steps=options.steps,
        batch_size=demo.STORIES_A_STEP,
        vectorize_data=True,
        learning_rate=demo.LEARNING_RATE,
        schedule="cosine",
        seed=0,
        evaluation=Evaluation(held, every=50, num_samples=16, simulations=0),
        folder=options.folder,
        checkpoint_every=10,
        resume=True,
    )
    print(history)
    print(history.evaluations)
    print(f"{time.process_time() - start:.0f} CPU seconds in this call")
    guide.save(options.folder / "infilling.safetensors", dtype=torch.float16)


if __name__ == "__main__":
    main()
