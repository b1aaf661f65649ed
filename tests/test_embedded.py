"""Arrays in contexts: an encoder's embeddings stand where tokens would."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import kl
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from llmppl import LM, Behaviour, Embedded, exact_posterior, fit, importance, smc
from llmppl.guides import AutoregressiveGuide, DirectGuide, PromptGuide, SoftPromptGuide, WordGuide
from llmppl.network import embedded
from llmppl.network.embedded import EmbeddedArrays
from llmppl.objectives import SubTrajectoryBalance, TrajectoryBalance, WakeSleep
from llmppl.testing import tiny_lm

WIDTH = 32
IMAGES = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Eye(nn.Module):
    """Two embeddings of an image of 2 × 4."""

    def __init__(self, seed: int = 0, count: int = 2, width: int = WIDTH) -> None:
        super().__init__()
        self.count = count
        self.layer = nn.Linear(8, count * width)
        with torch.no_grad():
            self.layer.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(seed))
            self.layer.bias.zero_()
        self.double()
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return self.layer(images.flatten(1)).reshape(len(images), self.count, -1)


@pytest.fixture
def eye() -> Eye:
    return Eye()


def plain(lm: LM, eye: Eye, before: str, image: Tensor, behind: str, text: Tensor) -> Tensor:
    """Log-probability of each token by a plain forward pass on embeddings."""
    embed = lm.transformer.get_input_embeddings()
    ids = [embed(lm.encode(piece)) if piece else torch.zeros(0, WIDTH).double() for piece in (before, behind)]
    rows = torch.cat([ids[0], eye(image[None])[0], ids[1], embed(text)])
    logits = lm.transformer(inputs_embeds=rows[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[-len(text) - 1 : -1].gather(-1, text[:, None])[:, 0]


@pytest.mark.parametrize(("before", "behind"), [("ab", "c"), ("", "c"), ("ab", ""), ("", "")])
def test_log_probabilities_are_those_of_a_plain_pass_on_embeddings(lm: LM, eye: Eye, before: str, behind: str) -> None:
    pieces = [*([before] if before else []), Embedded(eye, IMAGES, 2), *([behind] if behind else [])]
    law = lm(*pieces, max_tokens=3)
    assert law.batch_shape == (3,)
    text = law.sample()
    with torch.no_grad():
        expected = torch.stack([plain(lm, eye, before, i, behind, t) for i, t in zip(IMAGES, text, strict=True)])
        torch.testing.assert_close(law.token_log_prob(text), expected, rtol=1e-9, atol=1e-9)
    # Recorded while drawing, and scored anew, alone and among others.
    value, recorded = law.sample_with_log_prob()
    torch.testing.assert_close(recorded, lm(*pieces, max_tokens=3).log_prob(value).detach())
    alone = lm(*[Embedded(eye, IMAGES[1], 2) if isinstance(p, Embedded) else p for p in pieces], max_tokens=3)
    torch.testing.assert_close(alone.log_prob(text[1]).detach(), law.log_prob(text)[1].detach())


def test_a_law_behind_an_array_sums_to_one_and_differs_by_array(lm: LM, eye: Eye) -> None:
    law = lm(Embedded(eye, IMAGES, 2), "a", max_tokens=3, stop=".")
    texts = law.enumerate_support()
    with torch.no_grad():
        log_probs = law.log_prob(texts)
    torch.testing.assert_close(log_probs.logsumexp(0), torch.zeros(3).double(), atol=1e-9, rtol=0)
    assert float((log_probs[:, 0] - log_probs[:, 1]).abs().max()) > 0.1
    draws = law.sample((4000,))
    share = (draws[..., 0] == 1).double().mean(0)
    first = lm(Embedded(eye, IMAGES, 2), "a", max_tokens=1)
    expected = first.log_prob(torch.tensor([[1]])).exp().detach()
    assert float((share - expected).abs().max()) < 4 * (0.25 / 4000) ** 0.5


def test_equal_arrays_share_what_is_read(lm: LM, eye: Eye, monkeypatch: pytest.MonkeyPatch) -> None:
    eye.requires_grad_(False)
    passed: list[int] = []
    run = lm.network._run
    monkeypatch.setattr(lm.network, "_run", lambda s, tokens, *a: (passed.append(len(tokens)), run(s, tokens, *a))[1])
    same = torch.stack([IMAGES[0]] * 5)
    texts = lm.encode(["abc"] * 5)
    lm(Embedded(eye, same, 2), "a", max_tokens=3).log_prob(texts)
    # Two embeddings, "a", and "ab": a text's last token is predicted, never read.
    assert sum(passed) == 2 + 1 + 2
    assert max(eye.calls) == 1
    eye.calls.clear()
    lm(Embedded(eye, same.clone(), 2), "b", max_tokens=3).log_prob(texts)
    assert eye.calls == []  # frozen: made once


def seen(lm: LM, eye: nn.Module) -> tuple[Any, Any]:
    """A program whose text explains an image, and what a guide of it is told."""
    means = torch.linspace(-1, 1, lm.vocabulary, dtype=torch.float64)

    def program(image: Tensor) -> Tensor:
        text = pyro.sample("text", lm("ab", max_tokens=2, stop="."))
        level = lm.map(lambda t: float(means[ord(t[0]) % len(means)]) if t else 0.0, text, returns=float)
        mean = level.to(image.dtype)[..., None, None].expand(*level.shape, 2, 4)
        pyro.sample("image", dist.Normal(mean, 0.7).to_event(2), obs=image)
        return text

    return program, {"text": lambda image: [Embedded(eye, image, 2), "ab"]}


def log_q(guide: Any, image: Tensor, texts: Tensor) -> Tensor:
    with torch.no_grad():
        return poutine.trace(guide).get_trace(image).nodes["text"]["fn"].log_prob(texts)


def exact(lm: LM, program: Any, image: Tensor) -> tuple[Tensor, Tensor]:
    posterior = exact_posterior(program)(image)
    order = torch.as_tensor(posterior.samples["text"])
    return order, torch.as_tensor(posterior.log_weights).log_softmax(0)


@pytest.mark.long
@pytest.mark.parametrize("vectorize", [False, True])
def test_an_encoder_trains_with_its_guide_to_the_exact_posterior(lm: LM, eye: Eye, vectorize: bool) -> None:
    program, told = seen(lm, eye)
    guide = AutoregressiveGuide(program, lm, prompt=told, rank=4, seed=0)
    before = eye.layer.weight.detach().clone()
    data = [(image,) for image in IMAGES]
    behaviour = Behaviour(0.5, temperatures=(1.5, 3.0))
    fit(program, guide, data, TrajectoryBalance(32, behaviour=behaviour), 160 if vectorize else 60, batch_size=3,
        vectorize_data=vectorize, learning_rate=1e-2, schedule="cosine", seed=0, progress=False)  # fmt: skip
    assert float((eye.layer.weight.detach() - before).abs().max()) > 0.01
    for image in IMAGES:
        texts, log_p = exact(lm, program, image)
        found = log_q(guide, image, texts)
        most = 0.05 if vectorize else 0.5
        assert kl(found, log_p) < most
        assert kl(log_p, found) < most
    assert "encoder$$$layer.weight" in pyro.get_param_store()


def test_its_gradient_is_the_exact_one_and_that_of_pyros_svi(lm: LM, eye: Eye) -> None:
    """Of the ELBO, by enumeration: the encoder alone trains."""
    program, told = seen(lm, eye)
    guide = PromptGuide(program, lm, prompt=told)
    texts, _ = exact(lm, program, IMAGES[0])
    log_joint = torch.stack([
        poutine.trace(poutine.condition(program, {"text": text})).get_trace(IMAGES[0]).log_prob_sum().detach()
        for text in texts
    ])  # fmt: skip
    fn = poutine.trace(guide).get_trace(IMAGES[0]).nodes["text"]["fn"]
    own = fn.log_prob(texts)
    (own.exp() * (own - log_joint)).sum().backward()
    expected = eye.layer.weight.grad.clone()
    eye.zero_grad()
    pyro.set_rng_seed(0)
    total = torch.zeros_like(expected)
    for _ in range(3):
        TrajectoryBalance(2000).loss_and_grads(program, guide, IMAGES[0])
        total += eye.layer.weight.grad / 2 / 3  # its gradient is twice that of KL(q‖p)
        eye.zero_grad()
    assert float((total - expected).norm() / expected.norm()) < 0.1
    svi = SVI(program, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    weight = eye.layer.weight.detach().clone()
    svi.step(IMAGES[0])
    assert not torch.equal(weight, eye.layer.weight)


def test_a_frozen_encoder_stays_and_one_of_the_program_learns_by_em(lm: LM, eye: Eye) -> None:
    program, told = seen(lm, eye)
    eye.requires_grad_(False)
    guide = AutoregressiveGuide(program, lm, prompt=told, rank=2, seed=0)
    before = eye.layer.weight.clone()
    fit(program, guide, [(IMAGES[0],)], TrajectoryBalance(4), 3, seed=0, progress=False, learning_rate=1e-2)
    assert torch.equal(before, eye.layer.weight)
    assert not any("encoder" in name for name in pyro.get_param_store())
    # The program's own text stands behind the image: the encoder learns with the prior.
    other = Eye(1)

    def captioned(image: Tensor) -> None:
        theme = pyro.sample("theme", lm("a", max_tokens=1))
        pyro.sample("caption", lm(Embedded(other, image, 2, "other"), theme, max_tokens=2), obs=lm.encode("ed"))

    guide = AutoregressiveGuide(captioned, lm, rank=2, seed=0)
    start = float(importance(captioned, guide, 400, progress=False)(IMAGES[0]).log_evidence)
    history = fit(captioned, guide, [(IMAGES[0],)], WakeSleep(16), 30, seed=0, progress=False, learning_rate=1e-2)
    assert "other$$$layer.weight" in history.learned
    assert float(importance(captioned, guide, 400, progress=False)(IMAGES[0]).log_evidence) > start + 1.0


def test_search_and_weights_are_exact_behind_an_array(lm: LM, eye: Eye) -> None:
    def program(image: Tensor) -> None:
        text = pyro.sample("text", lm(Embedded(eye, image, 2), max_tokens=2, stop="."))
        pyro.sample("ending", lm(Embedded(eye, image, 2), text), obs=lm.encode("cd"))

    law = lm(Embedded(eye, IMAGES[0], 2), max_tokens=2, stop=".")
    texts = law.enumerate_support()
    with torch.no_grad():
        joint = law.log_prob(texts) + lm(Embedded(eye, IMAGES[0], 2), texts).log_prob(lm.encode("cd"))
    guide = AutoregressiveGuide(program, lm, prompt={"text": lambda image: [Embedded(eye, image, 2)]}, rank=2, seed=0)
    evidence = float(joint.logsumexp(0))
    for infer in (importance(program, guide, 2000, progress=False), smc(program, guide, 2000, progress=False),
                  smc(program, None, 2000, progress=False)):  # fmt: skip
        assert float(infer(IMAGES[0]).log_evidence) == pytest.approx(evidence, abs=0.1)
    assert float(exact_posterior(program)(IMAGES[0]).log_evidence) == pytest.approx(evidence, abs=1e-9)
    rows = importance(program, guide, 500, vectorize_data=True, progress=False)(IMAGES)
    assert rows.batch_shape == (3,)
    assert float(rows.row(0).log_evidence) == pytest.approx(evidence, abs=0.2)
    SubTrajectoryBalance(4).loss_and_grads(program, guide, IMAGES[0])
    assert eye.layer.weight.grad is not None


def test_checkpoints_resume_with_the_encoder_bit_for_bit(tmp_path: Any) -> None:
    def run(steps: int, folder: str, resume: bool = False) -> Tensor:
        pyro.clear_param_store()
        lm, eye = tiny_lm(dtype=torch.float64), Eye()
        program, told = seen(lm, eye)
        guide = AutoregressiveGuide(program, lm, prompt=told, rank=2, seed=0)
        fit(program, guide, [(image,) for image in IMAGES], TrajectoryBalance(4), steps, seed=0, progress=False,
            folder=folder, checkpoint_every=3, resume=resume, learning_rate=1e-2)  # fmt: skip
        return torch.cat([p.detach().flatten() for p in (*eye.parameters(), *guide.parameters())])

    whole = run(6, str(tmp_path / "whole"))
    run(3, str(tmp_path / "parts"))
    assert torch.equal(whole, run(6, str(tmp_path / "parts"), resume=True))


def test_other_guides_read_arrays_and_copies_do(lm: LM, eye: Eye) -> None:
    program, told = seen(lm, eye)
    soft = SoftPromptGuide(program, lm, prompt=told, num_virtual_tokens=2, seed=0)
    fit(program, soft, [(IMAGES[0],)], TrajectoryBalance(4), 2, seed=0, progress=False)
    texts, _ = exact(lm, program, IMAGES[0])
    own = log_q(soft, IMAGES[0], texts)
    assert float(own.logsumexp(0)) == pytest.approx(0.0, abs=1e-6)
    assert not torch.allclose(own, log_q(soft, IMAGES[1], texts), atol=1e-4)
    with pytest.raises(ValueError, match="what fills gaps reads text alone, and a piece is an array"):
        DirectGuide(program, lm, prompt=told, seed=0)(IMAGES[0])
    law = lm(Embedded(eye, IMAGES, 2), max_tokens=2)
    text = law.sample()
    for twin in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        found = twin(Embedded(eye, IMAGES, 2), max_tokens=2).log_prob(text)
        torch.testing.assert_close(found, law.log_prob(text))


def test_what_has_changed_is_scored_anew(lm: LM, eye: Eye) -> None:
    law = lm(Embedded(eye, IMAGES, 2), max_tokens=2)
    text = law.sample()
    before = law.log_prob(text).detach()
    options = lm.choice(Embedded(eye, IMAGES, 2), options=["a", "bc"])
    chosen = options.logits.detach()
    with torch.no_grad():
        eye.layer.weight += 0.5
        after = lm(Embedded(eye, IMAGES, 2), max_tokens=2).log_prob(text)
        torch.testing.assert_close(law.log_prob(text), after)
        assert not torch.allclose(before, after, atol=1e-3)
        assert not torch.allclose(chosen, lm.choice(Embedded(eye, IMAGES, 2), options=["a", "bc"]).logits, atol=1e-3)


def test_an_encoder_that_is_gone_leaves_no_size_behind(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may be that of the next one, which has another number of embeddings."""
    monkeypatch.setattr(embedded, "KEPT", 1)
    arrays = EmbeddedArrays(lm.transformer)
    for n in range(4):
        encoder = Eye(count=1 + n % 3).requires_grad_(False)
        assert arrays.ids(Embedded(encoder, IMAGES[0] + n, 2)).shape == (1 + n % 3,)
        del encoder
        gc.collect()
    assert len(arrays._sizes) == 1, "that of the one array that is kept"


def test_what_cannot_be_embedded_is_named(lm: LM, eye: Eye) -> None:
    image = IMAGES[0]
    bad: list[tuple[Any, Any]] = [
        (lambda: Embedded(image, image, 2), "must be a torch.nn.Module"),
        (lambda: Embedded(eye, image.numpy(), 2), r"got ndarray. Pass torch.as_tensor"),
        (lambda: Embedded(eye, image.long(), 2), r"dtype torch.int64. Pass floating numbers"),
        (lambda: Embedded(eye, (255 * image).to(torch.uint8), 2), "image.float"),
        (lambda: Embedded(eye, image, 3), "fewer than event_dim=3"),
        (lambda: Embedded(eye, image, 0), "event_dim=0 must be a whole number"),
        (lambda: Embedded(eye, image[:0], 2), "is empty"),
        (lambda: Embedded(eye, image.where(image < 0, torch.nan), 2), r"array is nan at \("),
        (lambda: lm(Embedded(eye, torch.randn(3, 5), 2)), r"encoder=Eye refuses arrays of shape \(1, 3, 5\)"),
        (
            lambda: lm(Embedded(Eye(width=7), image, 2, "narrow")),
            r"returns shape \(1, 2, 7\) for 1 arrays. .* 32 is the width",
        ),
        (lambda: lm(Embedded(nn.Sequential(nn.Dropout(), Eye()), image, 2, "other")), "Call encoder.eval"),
        (lambda: lm("a", Embedded(Eye(1), image, 2)), "two encoders are called 'encoder'"),
        (lambda: lm(Embedded(eye, IMAGES, 2), ["a", "b"]), "do not fit|broadcast|rows"),
    ]
    lm(Embedded(eye, image, 2))
    for call, message in bad:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    program, told = seen(lm, eye)
    guide = AutoregressiveGuide(program, lm, prompt=told, rank=2, sampling_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="sampling_dtype=torch.bfloat16: a copy of the model reads no arrays"):
        guide(image)

    def with_word(image: Tensor, word: str) -> None:
        text = pyro.sample("text", lm("ab", max_tokens=2, stop="."))
        pyro.sample("word", lm.echo(text), obs=lm.encode(word))
        pyro.sample("image", dist.Normal(torch.zeros(2, 4), 1.0).to_event(2), obs=image)

    guide = WordGuide(with_word, lm, "word", prompt={"text": lambda image: [Embedded(eye, image, 2)]})
    with pytest.raises(ValueError, match="an encoder of this context trains"):
        guide(image, "c")
    eye.requires_grad_(False)
    guide(image, "c")


def test_its_repr_tells(eye: Eye) -> None:
    assert repr(Embedded(eye, IMAGES, 2)) == "Embedded(Eye, array of shape (3, 2, 4), 'encoder')"
