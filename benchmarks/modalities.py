"""Text that explains a picture: a guide that sees it, against the enumerated posterior.

    python benchmarks/modalities.py

The handwritten digits of scikit-learn (1,797 of 8 × 8), ten captions ("a seven"), class-conditional Gaussian
mixtures fitted to 1,200 of them. A small convolutional classifier learns the posterior over captions alone, then its
guess, in the language model's own embeddings, is what the guide is told, an adapter of rank 4 that learns by wake-φ and
then by balance on the training images without their labels. On 300 images that nothing has seen: KL
both ways from the enumerated posterior, accuracy against the labels, expected calibration error (15 bins) of captions
against the *posterior's* draws and against the labels, and CPU time of one pass against ten likelihoods.
"""

from __future__ import annotations

import argparse
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
from llmppl.models.encoders import SmallEye, SoftSentence
from llmppl.models.image_mixtures import ImageMixtures
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.programs.plates import in_data_plate

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f" an {name}" if name == "eight" else f" a {name}" for name in NAMES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--awake", type=int, default=60, help="steps of wake-φ")
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


def trained(program: Any, guide: Any, rows: list[Any], options: Any, told: Callable[[], str], particles: int) -> float:
    """Wake-φ, then balance, which weighs what leaks to captions that are out of the question; CPU seconds."""
    shown = {"batch_size": 16, "vectorize_data": True, "learning_rate": 5e-4, "progress": False}

    def say(step: int, history: Any) -> None:
        if step % 30 == 0:
            print(f"step {step}: {told()}", flush=True)

    def work() -> None:
        wake = WakeSleep(particles, insomnia=1.0, behaviour=Behaviour(prior=0.5))
        fit(program, guide, rows, wake, options.awake, seed=1, schedule="cosine", callback=say, **shown)
        balance = TrajectoryBalance(particles, behaviour=Behaviour(prior=0.5))
        fit(program, guide, rows, balance, options.balance, seed=2, schedule="cosine", callback=say, **shown)

    return timed(work)[1]


def noisy(images: Tensor, most: float, source: torch.Generator) -> Tensor:
    """Each image with noise of a standard deviation of its own: 1,200 are few for what a posterior says of others."""
    deviation = most * torch.rand(len(images), 1, 1, generator=source)
    return images + deviation * torch.randn(images.shape, generator=source)


def learn_classes(classifier: nn.Module, images: Tensor, prior: Tensor, likelihood: Any, options: Any) -> float:
    """Teach a classifier the posterior over captions; no language model is read. CPU seconds."""
    source = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(classifier.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.eye)

    def work() -> None:
        for _ in range(options.eye):
            chosen = noisy(images[torch.randint(len(images), (64,), generator=source)], options.noise, source)
            truth = (prior + likelihood.log_probs(chosen)).softmax(-1)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(classifier(chosen), truth).backward()
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
    guess = SoftSentence(classifier, lm, CAPTIONS)

    def told(image: Tensor) -> list[Any]:
        said = Embedded(guess, image, 2)
        return [PROMPT, said, "\n" + PROMPT, said, "\n" + PROMPT]

    guide = AutoregressiveGuide(program, lm, prompt={"caption": told}, rank=4, seed=0)
    source = torch.Generator().manual_seed(1)
    shown = torch.cat([training, *(noisy(training, options.noise, source) for _ in range(options.copies))])
    print(
        f"the classifier alone: {learn_classes(classifier, training, prior, likelihood, options):.0f} CPU s", flush=True
    )
    classifier.requires_grad_(False)

    def distances(found: Tensor) -> str:
        backward, forward = (found.exp() * (found - exact)).sum(-1), (exact.exp() * (exact - found)).sum(-1)
        return f"KL(q‖p) {backward.mean():.3f}, KL(p‖q) {forward.mean():.3f}, of 300 the worst {forward.max():.1f}"

    def guessed() -> Tensor:
        return torch.as_tensor(laws(guide, held, "caption").logits.reshape(len(held), -1))

    def said() -> str:
        return distances(guessed())

    with torch.no_grad():
        print(f"the classifier alone: {distances(classifier(held).log_softmax(-1))}\nuntrained: {said()}", flush=True)
    cpu = trained(program, guide, [(image,) for image in shown], options, said, 24)
    found, one_pass = timed(guessed)
    posterior = torch.distributions.Categorical(logits=exact).sample()
    rows = [
        [name, float((law.argmax(-1) == truth).float().mean()), calibration(law, posterior), calibration(law, truth)]
        for name, law in (("prior", prior.expand_as(exact)), ("guide", found), ("posterior", exact))
    ]
    each, others = 1e3 * one_pass / len(held), 1e3 * seconds / len(held)
    print(
        f"\ndigits: {said()}; {cpu:.0f} CPU s of training; "
        f"one pass {each:.1f} ms an image, ten likelihoods {others:.2f}\n"
    )
    print(table(["captions by", "accuracy", "ECE against the posterior, %", "ECE against the labels, %"], rows))


def calibration(log_probs: Tensor, truth: Tensor) -> float:
    """Expected calibration error of the most probable caption, per cent."""
    confidence, chosen = log_probs.detach().exp().max(-1)
    return 100 * calibration_error(confidence.numpy(), (chosen == truth).numpy().astype(float), bins=15)


if __name__ == "__main__":
    main()
