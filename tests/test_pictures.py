"""Programs whose text explains what is no text: pictures with captions, series with descriptions."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pyro
import pytest
import torch
from conftest import character_lm, kl
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

from llmppl import LM, Embedded, Grammar, exact_posterior, fit, importance, simulate
from llmppl.guides import AutoregressiveGuide
from llmppl.models import captioned, described, described_series, descriptions
from llmppl.models.described_series import MONTHS
from llmppl.models.encoders import SeenChoice, SmallEar, SmallEye, SoftSentence, image_told, series_told
from llmppl.models.image_mixtures import ImageMixtures
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.programs.plates import in_data_plate
from llmppl.programs.structure import structure

CAPTIONS = ["a", "bc", "d"]


def mixtures(seed: int = 0) -> ImageMixtures:
    source = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 2, 4, 4, generator=source)
    return ImageMixtures(torch.tensor([[0.0, 1.0], [0.5, 0.0], [2.0, 0.0]]), means, torch.full((3, 2, 4, 4), 1.5))


def images(count: int, seed: int = 1) -> Tensor:
    pyro.set_rng_seed(seed)
    return mixtures()(torch.arange(count) % 3).sample()


def exact(lm: LM, seen: Tensor) -> Tensor:
    """Log-posterior of each caption, ``(N, 3)``, from the parts."""
    prior = lm.choice("A", options=CAPTIONS).logits.detach().float()
    return (prior + mixtures().log_probs(seen)).log_softmax(-1)


@pytest.fixture
def characters() -> LM:
    return character_lm("A" + "abcd.")


def test_the_mixtures_are_those_of_their_parts_and_are_fitted_class_by_class() -> None:
    found = mixtures()
    seen = images(5)
    expected = torch.stack([
        torch.logsumexp(torch.stack([
            found.logits[c, m] + torch.distributions.Normal(found.means[c, m], 1.5).log_prob(seen).sum((1, 2))
            for m in range(2)
        ]), 0)
        for c in range(3)
    ], -1)  # fmt: skip
    torch.testing.assert_close(found.log_probs(seen), expected)
    pytest.importorskip("sklearn")
    labels = torch.arange(90) % 3
    fitted = ImageMixtures.fitted(images(90), labels, components=2, variance=0.1)
    held = images(60, seed=5)
    right = (fitted.log_probs(held).argmax(-1) == torch.arange(60) % 3).float().mean()
    assert right > 0.8  # 0.88; by chance 0.33
    assert repr(fitted) == "ImageMixtures(3 classes of 2 components, images of 4 × 4)"
    with pytest.raises(ValueError, match="class 1 has 1 images, fewer than components=2"):
        ImageMixtures.fitted(images(3), torch.tensor([0, 0, 1]), components=2)


def test_the_posterior_over_captions_is_enumerated_and_simulated(characters: LM) -> None:
    program = captioned(characters, CAPTIONS, mixtures(), prompt="A")
    seen = images(3)
    for image, log_p in zip(seen, exact(characters, seen), strict=True):
        found = exact_posterior(program)(image)
        texts = [str(t) for t in found.decode("caption")]
        weights = {text: float(w) for text, w in zip(texts, found.weights, strict=True)}
        assert [weights[c] for c in CAPTIONS] == pytest.approx(log_p.exp().tolist(), abs=1e-5)
    pairs = simulate(program, [(seen[0],)], 200, seed=0, progress=False)
    drawn = [characters.decode(pair.latents["caption"]) for pair in pairs]
    labels = torch.tensor([CAPTIONS.index(text) for text in drawn])
    shown = torch.stack([pair.observations["image"] for pair in pairs])
    # Images of their own captions: the most probable class of most.
    assert (mixtures().log_probs(shown).argmax(-1) == labels).float().mean() > 0.9


@pytest.mark.long
def test_a_guide_that_sees_the_image_reaches_the_posterior_on_images_it_has_not_seen(characters: LM) -> None:
    program = captioned(characters, CAPTIONS, mixtures(), prompt="A")
    eye = SmallEye(characters.transformer.config.hidden_size, channels=8, scale=1.0)
    guide = AutoregressiveGuide(program, characters, prompt=image_told(eye, prompt="A"), rank=4, seed=0)
    rows = [(image,) for image in images(96, seed=2)]
    fit(program, guide, rows, WakeSleep(16, insomnia=1.0), 150, batch_size=16, vectorize_data=True,
        learning_rate=1e-2, schedule="cosine", seed=0, progress=False)  # fmt: skip
    held = images(60, seed=3)
    with torch.no_grad():
        found = poutine.trace(in_data_plate(guide)).get_trace(held).nodes["caption"]["fn"].logits.reshape(60, 3)
    log_p = exact(characters, held)
    prior = characters.choice("A", options=CAPTIONS).logits.detach()
    gaps = [(kl(p, q) + kl(q, p)) / 120 for p, q in ((log_p, found.float()), (log_p, prior.expand(60, 3).float()))]
    assert gaps[0] < 0.25 < gaps[1]
    posterior = importance(program, guide, 300, progress=False)(held[0])
    assert float(posterior.log_evidence) == pytest.approx(
        float(
            (characters.choice("A", options=CAPTIONS).logits.detach() + mixtures().log_probs(held[:1])).logsumexp(-1)
        ),
        abs=0.15,
    )


class Likelihood(torch.nn.Module):
    """log p(x|c) itself, up to what all captions share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * mixtures().log_probs(images) + images.sum((1, 2))[:, None]


def test_a_seen_choice_whose_classifier_is_the_likelihood_is_the_posterior(characters: LM) -> None:
    """By weights that are all equal, alone, in rows and of simulated images; and it learns a scale that is off."""
    program, classifier = captioned(characters, CAPTIONS, mixtures(), prompt="A"), Likelihood()
    guide = SeenChoice(classifier, characters, CAPTIONS, prompt="A")
    assert [name for name, _ in guide.named_parameters()] == ["classifier.scale"]
    seen = images(4)
    log_p = exact(characters, seen)
    found = poutine.trace(in_data_plate(guide)).get_trace(seen).nodes["caption"]["fn"]
    torch.testing.assert_close(found.logits.reshape(4, 3).float(), log_p, atol=1e-4, rtol=0)
    other = poutine.trace(guide).get_trace(seen[0], observations={"image": seen[1]}).nodes["caption"]["fn"]
    torch.testing.assert_close(other.logits.float(), log_p[1], atol=1e-4, rtol=0)
    posterior = importance(program, guide, 50, progress=False)(seen[0])
    assert float(posterior.ess) == pytest.approx(50, abs=1e-2)
    evidence = characters.choice("A", options=CAPTIONS).logits.float() + mixtures().log_probs(seen[:1])
    assert float(posterior.log_evidence) == pytest.approx(float(evidence.logsumexp(-1)), abs=1e-3)
    classifier.scale.data.fill_(0.1)
    fit(program, guide, [(image,) for image in images(64, seed=2)], WakeSleep(8, insomnia=1.0), 120, batch_size=16,
        vectorize_data=True, learning_rate=0.05, schedule="cosine", seed=0, progress=False)  # fmt: skip
    assert float(classifier.scale.detach()) == pytest.approx(1.0, abs=0.2)
    # Another guide of the kind, in one session, learns by itself; a frozen one is quietly run.
    again = SeenChoice(Likelihood(), characters, CAPTIONS, prompt="A")
    again.classifier.scale.data.fill_(0.1)
    svi = SVI(program, again, pyro.optim.Adam({"lr": 0.05}), WakeSleep(8, insomnia=1.0))
    for _ in range(3):
        svi.step(seen[0])
    assert float(again.classifier.scale.detach()) > 0.11
    poutine.trace(again.requires_grad_(False)).get_trace(seen[0])
    with pytest.raises(ValueError, match=r"tilt= has shape \(3,\).*a number for each option"):
        SeenChoice(Likelihood(), characters, CAPTIONS[:2], prompt="A")(seen[0])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (" rises until May, then falls.", [0, 1, 2, 3, 4, 3, 2, 1, 0, -1, -2, -3]),
        (" stays flat all year.", [0] * 12),
        ("falls sharply all year", [-2 * n for n in range(12)]),
        (" stays flat until November, then rises sharply.", [0] * 11 + [2]),
    ],
)
def test_descriptions_have_their_series(text: str, values: list[float]) -> None:
    assert described(text) == values


def test_all_descriptions_are_described_and_what_is_none_is_said() -> None:
    texts = descriptions()
    assert len(texts) == len(set(texts)) == 205
    assert all(len(described(text)) == 12 for text in texts)
    assert len({tuple(described(text)) for text in texts}) == 205
    for wrong in ("", " rises until Mai, then falls.", " rises until May, then falls sharply and rises.", " soars."):
        with pytest.raises(ValueError, match="is no description. Write e.g."):
            described(wrong)


@pytest.fixture
def letters() -> LM:
    return character_lm("".join(sorted({c for text in descriptions() for c in text} | set("N,.\n"))) + "$", end="$")


def test_a_series_is_explained_by_the_exact_posterior_and_in_rows(letters: LM) -> None:
    program = described_series(letters, prompt="N", max_tokens=60)
    y = torch.tensor(described(" rises until May, then falls.")) + 0.5
    pattern = "|".join(text.replace(".", r"\.") for text in descriptions())
    law = letters("N", grammar=Grammar.regex(pattern), max_tokens=60)
    texts = law.enumerate_support()
    strings = [text.removesuffix("$") for text in letters.decode(texts)]
    assert sorted(strings) == sorted(descriptions())
    means = torch.tensor([described(text) for text in strings])
    joint = law.log_prob(texts) + torch.distributions.Normal(means, 1.0).log_prob(y).sum(-1)
    exact_z = float(joint.logsumexp(0))
    assert float(exact_posterior(program)(y).log_evidence) == pytest.approx(exact_z, abs=1e-4)
    ear = SmallEar(letters.transformer.config.hidden_size, unit=4.0, channels=8)
    guide = AutoregressiveGuide(program, letters, prompt=series_told(ear, prompt="N"), rank=2, seed=0)
    rows = torch.stack([y, -y])
    posterior = importance(program, guide, 40, vectorize_data=True, progress=False)(rows)
    assert posterior.batch_shape == (2,)
    TrajectoryBalance(4).loss_and_grads(program, guide, y)
    assert all(p.grad is not None for p in ear.parameters())


def test_numpyro_describes_series_with_the_same_evidence(letters: LM, tmp_path: Path) -> None:
    from llmppl.numpyro import LM as Twin
    from llmppl.numpyro import exact_posterior as twin_posterior
    from llmppl.numpyro.models import described_series as twin_series

    letters.transformer.float().save_pretrained(tmp_path)
    letters.tokenizer.save_pretrained(tmp_path)
    y = torch.tensor(described(" falls until June, then rises.")) - 0.3
    ours = exact_posterior(described_series(letters, prompt="N", max_tokens=60))(y).log_evidence
    twin = twin_series(Twin.from_pretrained(tmp_path), prompt="N", max_tokens=60)
    assert twin_posterior(twin)(y.numpy()).log_evidence == pytest.approx(ours, abs=1e-3)


class Thirds(torch.nn.Module):
    """Logits of arrays ``(N, 3)``: themselves, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, arrays: Tensor) -> Tensor:
        return self.scale * arrays


def test_a_sentence_that_is_certain_is_read_as_if_it_were_written(letters: LM) -> None:
    sentences = ["rsu", "u", "ta"]
    sure = SoftSentence(Thirds(), letters, sentences, padding="e")
    law = letters("s", Embedded(sure, 1e4 * torch.eye(3), 1), "t", max_tokens=2, stop=".")
    for n, padded in enumerate(["rsu", "uee", "tae"]):
        written = letters("s" + padded + "t", max_tokens=2, stop=".")
        texts = written.enumerate_support()
        torch.testing.assert_close(law.log_prob(texts[:, None])[:, n], written.log_prob(texts), rtol=0, atol=1e-5)


def test_a_soft_sentence_mixes_embeddings_and_its_classifier_learns(letters: LM) -> None:
    """The mixture from the table of embeddings; a gradient reaches the classifier."""
    table = letters.transformer.get_input_embeddings().weight.detach()
    encoder = SoftSentence(Thirds(), letters, ["rs", "tu", "sr"])
    a, b, c, d = (table[letters.encode(x)[0]] for x in "rstu")
    array = torch.tensor([[0.3, -1.0, 0.5]])
    p = array[0].to(table.dtype).softmax(-1)
    expected = torch.stack([p[0] * a + p[1] * c + p[2] * b, p[0] * b + p[1] * d + p[2] * a])[None]
    torch.testing.assert_close(encoder(array), expected)
    letters(Embedded(encoder, array[0], 1), max_tokens=1).log_prob(letters.encode("a")).backward()
    (scale,) = encoder.parameters()
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 0
    with pytest.raises(ValueError, match=r"logits have shape \(1, 2\); 1 arrays and 3 sentences make \(1, 3\)"):
        encoder(array[:, :2])


def test_sentences_that_cannot_be_mixed_are_named(letters: LM) -> None:
    with pytest.raises(TypeError, match="sentences must be a list of strings, got 'as'"):
        SoftSentence(Thirds(), letters, "as")
    for sentences in ([], ["a", ""]):
        with pytest.raises(ValueError, match="must be a list of texts, none empty"):
            SoftSentence(Thirds(), letters, sentences)
    with pytest.raises(ValueError, match="padding='as' has 2 tokens"):
        SoftSentence(Thirds(), letters, ["a"], padding="as")


def test_what_makes_no_sense_is_named(characters: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="noise must be positive, got 0"):
        described_series(characters, noise=0)
    good = mixtures()
    with pytest.raises(ValueError, match=r"must be \(classes, components\) and twice"):
        ImageMixtures(good.logits[0], good.means, good.scales)
    with pytest.raises(ValueError, match="scales must be positive"):
        ImageMixtures(good.logits, good.means, 0 * good.scales)
    monkeypatch.setitem(sys.modules, "sklearn.mixture", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-llmppl\[pictures\]'"):
        ImageMixtures.fitted(images(6), torch.arange(6) % 3)
    assert len(MONTHS) == 12


def test_a_description_has_one_spelling_on_a_real_model(smollm2: LM) -> None:
    """The law's whole mass lies on the tokenizer's own spellings; under the grammar alone it is a fortieth."""
    program = described_series(smollm2)
    texts = smollm2.encode([text + smollm2.spelling.end for text in descriptions()], special=True)
    law = structure(program, (torch.zeros(12),), {}).nodes["description"]["fn"]
    padded = torch.nn.functional.pad(texts, (0, law.event_shape[0] - texts.shape[1]), value=-1)
    with torch.no_grad():
        mass = torch.cat([law.log_prob(some) for some in padded.split(41)]).logsumexp(0)
    assert float(mass) == pytest.approx(0.0, abs=1e-3)


def test_a_seen_choice_pickles_and_copies_after_a_call(characters: LM) -> None:
    guide = SeenChoice(Likelihood(), characters, CAPTIONS, prompt="A")
    image = torch.zeros(1, 4, 4)
    guide(image)
    again, twin = pickle.loads(pickle.dumps(guide)), copy.deepcopy(guide)
    assert len({own._number for own in (guide, again, twin)}) == 3, "modules of their own in Pyro's store"
    assert twin._lm[0] is characters
    assert twin.classifier is not guide.classifier
