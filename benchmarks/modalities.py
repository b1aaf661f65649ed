"""Text that explains a picture: a guide that sees it, against the enumerated posterior.

    python benchmarks/modalities.py

The handwritten digits of scikit-learn (1,797 of 8 × 8), ten captions ("a seven"), class-conditional Gaussian
mixtures fitted to 1,200 of them. A small convolutional classifier learns alone how much more each image is of one
caption than of another, so that with the language model's prior it says the posterior. It is then part of two guides.
One is the prior tilted by it (``SeenChoice``), and goes on learning by wake-φ. The other is a language model that is
told what it says, in the model's own embeddings, under an adapter of rank 4 that learns by wake-φ and then by balance;
both on the training images without their labels. On 300 images that nothing has seen: KL both ways from the enumerated
posterior, accuracy against the labels, expected calibration error (15 bins) of captions against the posterior
and against the labels, and CPU time of one pass against ten likelihoods.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import calibration_error, machine, table
from pyro import poutine
from torch import Tensor, nn

from llmppl import LM, Behaviour, Embedded, fit
from llmppl.guides import AutoregressiveGuide
from llmppl.models import captioned
from llmppl.models.captioned import PROMPT
from llmppl.models.encoders import SeenChoice, SmallEye, SoftSentence
from llmppl.models.image_mixtures import ImageMixtures
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.programs.plates import in_data_plate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f" an {name}" if name == "eight" else f" a {name}" for name in NAMES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seen", type=int, default=200, help="steps of wake-φ of the tilted prior")
    parser.add_argument("--awake", type=int, default=60, help="steps of wake-φ of the guide that reads")
    parser.add_argument("--balance", type=int, default=60, help="steps, after those")
    parser.add_argument("--eye", type=int, default=5000, help="steps in which the classifier learns alone")
    parser.add_argument("--noise", type=float, default=0.3, help="most of the noise on the training images")
    parser.add_argument("--copies", type=int, default=8, help="noisy ones of each training image")
    parser.add_argument("--variance", type=float, default=0.1, help="added to each pixel's, of digits")
    parser.add_argument("--held-out", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    digits(LM.from_pretrained("smollm2-135m"), options)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def trained(program: Any, guide: Any, rows: list[Any], objective: Any, steps: int, told: Callable[[], str]) -> float:
    """CPU seconds."""

    def say(step: int, history: Any) -> None:
        if step % 30 == 0:
            print(f"step {step}: {told()}", flush=True)

    return timed(
        lambda: fit(program, guide, rows, objective, steps, batch_size=16, vectorize_data=True, learning_rate=5e-4,
                    schedule="cosine", seed=1, callback=say, progress=False)
    )[1]  # fmt: skip


def noisy(images: Tensor, most: float, source: torch.Generator) -> Tensor:
    """Each image with noise of a standard deviation of its own: 1,200 are few for what a posterior says of others."""
    deviation = most * torch.rand(len(images), 1, 1, generator=source)
    return images + deviation * torch.randn(images.shape, generator=source)


class Informed(nn.Module):
    """A classifier's scores behind a prior: the logits of a posterior."""

    def __init__(self, classifier: nn.Module, prior: Tensor) -> None:
        super().__init__()
        self.classifier, self.prior = classifier, prior

    def forward(self, images: Tensor) -> Tensor:
        return self.prior + self.classifier(images)


def learn_classes(posterior: Informed, images: Tensor, likelihood: Any, options: Any) -> float:
    """Teach a classifier what makes the prior a posterior; no language model is read. CPU seconds."""
    source = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(posterior.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.eye)

    def work() -> None:
        for _ in range(options.eye):
            chosen = noisy(images[torch.randint(len(images), (64,), generator=source)], options.noise, source)
            truth = (posterior.prior + likelihood.log_probs(chosen)).softmax(-1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(posterior(chosen), truth).backward()
            optimizer.step()
            schedule.step()

    return timed(work)[1]


def laws(guide: Any, rows: Tensor, site: str) -> Any:
    with torch.no_grad():
        return poutine.trace(in_data_plate(guide)).get_trace(rows).nodes[site]["fn"]


def digits(lm: LM, options: Any) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(data.images / 16).float()[order], torch.tensor(data.target)[order]
    training, held = images[:1200], images[1200 : 1200 + options.held_out]
    likelihood = ImageMixtures.fitted(training, labels[:1200], components=4, variance=options.variance)
    truth = labels[1200 : 1200 + options.held_out]
    program = captioned(lm, CAPTIONS, likelihood)
    prior = lm.choice(PROMPT, options=CAPTIONS).logits.detach()
    exact, seconds = timed(lambda: (prior + likelihood.log_probs(held)).log_softmax(-1))
    eye = SmallEye(lm.transformer.config.hidden_size, scale=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(eye, nn.Linear(eye.norm.normalized_shape[0], len(CAPTIONS)))
    source = torch.Generator().manual_seed(1)
    shown = [
        (i,) for i in torch.cat([training, *(noisy(training, options.noise, source) for _ in range(options.copies))])
    ]
    informed = Informed(classifier, prior)
    print(f"the classifier, alone: {learn_classes(informed, training, likelihood, options):.0f} CPU s", flush=True)
    guess = SoftSentence(Informed(copy.deepcopy(classifier), prior).requires_grad_(False), lm, CAPTIONS)

    def told(image: Tensor) -> list[Any]:
        said = Embedded(guess, image, 2)
        return [PROMPT, said, "\n" + PROMPT, said, "\n" + PROMPT]

    seen = SeenChoice(classifier, lm, CAPTIONS)
    reads = AutoregressiveGuide(program, lm, prompt={"caption": told}, rank=4, seed=0)
    wake = WakeSleep(24, insomnia=1.0, behaviour=Behaviour(prior=0.5))
    balance = TrajectoryBalance(24, behaviour=Behaviour(prior=0.5))

    def distances(found: Tensor) -> str:
        backward, forward = (found.exp() * (found - exact)).sum(-1), (exact.exp() * (exact - found)).sum(-1)
        return f"KL(q‖p) {backward.mean():.3f}, KL(p‖q) {forward.mean():.3f}, of 300 the worst {forward.max():.1f}"

    def law(guide: Any) -> Tensor:
        return torch.as_tensor(laws(guide, held, "caption").logits.reshape(len(held), -1))

    def said(guide: Any) -> Callable[[], str]:
        return lambda: distances(law(guide))

    found = {"the prior": prior.expand_as(exact), "the posterior": exact}
    for name, guide, steps in (
        ("the prior, tilted", seen, [(wake, options.seen)]),
        ("the guide that reads", reads, [(wake, options.awake), (balance, options.balance)]),
    ):
        print(f"\n{name}: {said(guide)()}", flush=True)
        cpu = sum(trained(program, guide, shown, objective, count, said(guide)) for objective, count in steps if count)
        found[name], one_pass = timed(lambda guide=guide: law(guide))
        each, others = 1e3 * one_pass / len(held), 1e3 * seconds / len(held)
        times = f"one pass {each:.2f} ms an image, ten likelihoods {others:.2f}"
        print(f"{name}: {said(guide)()}; {cpu:.0f} CPU s of training; {times}", flush=True)
    labels = torch.nn.functional.one_hot(truth, len(CAPTIONS)).float()
    rows = [
        [name, float((own.argmax(-1) == truth).float().mean()), calibration(own, exact.exp()), calibration(own, labels)]
        for name, own in found.items()
    ]
    heads = ["captions by", "accuracy", "ECE against the posterior, %", "ECE against the labels, %"]
    print("", table(heads, rows), sep="\n")


def calibration(log_probs: Tensor, truth: Tensor) -> float:
    """Expected calibration error of the most probable caption, per cent.

    :param truth: how probable each caption is, ``(N, captions)``: by a posterior, or one and zeros by a label.
    """
    confidence, chosen = log_probs.detach().exp().max(-1)
    right = truth.gather(-1, chosen[:, None])[:, 0]
    return 100 * calibration_error(confidence.numpy(), right.numpy().astype(float), bins=15)


if __name__ == "__main__":
    main()
