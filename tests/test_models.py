"""The ready programs."""

from __future__ import annotations

import pyro
import pytest
import torch

from llmppl import LM, exact_posterior, importance
from llmppl.guides import PromptGuide
from llmppl.models import continuation, ending_first, infilling


def test_infilling_is_prior_times_likelihood(lm: LM) -> None:
    story = infilling(lm, max_tokens=3)
    posterior = exact_posterior(story)("ab", "cd")
    texts = lm("ab", max_tokens=3, stop=".").enumerate_support()
    log_joint = lm("ab", max_tokens=3, stop=".").log_prob(texts) + lm("ab", texts).log_prob(lm.encode("cd"))
    assert posterior.log_evidence == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_continuation_tempers_the_whole_sentence(lm: LM, temperature: float) -> None:
    program = continuation(lm, temperature=temperature, max_tokens=3)
    posterior = exact_posterior(program)("ab")
    texts = lm("ab", max_tokens=3, stop=".").enumerate_support()
    expected = (lm("ab", max_tokens=3, stop=".").log_prob(texts) / temperature).softmax(0)
    torch.testing.assert_close(torch.as_tensor(posterior.weights), expected)
    # Tempering its tokens instead gives another law.
    local = lm("ab", max_tokens=3, stop=".", temperature=temperature).log_prob(texts).exp()
    if temperature != 1.0:
        assert (local - expected).abs().max() > 0.01
    with pytest.raises(ValueError, match="temperature must be positive"):
        continuation(lm, temperature=0.0)


def test_infilling_runs_on_the_real_model_in_batches(smollm2: LM) -> None:
    story = infilling(smollm2, max_tokens=8)
    guide = PromptGuide(story, smollm2, prompt={"middle": ending_first})
    beginnings = ["Tom lost his key.", "Anna baked a cake. She left it in the oven."]
    endings = [" He climbed in through the window.", " It was black."]
    pyro.set_rng_seed(0)
    posterior = importance(story, guide, 6, vectorize_data=True)(beginnings, endings)
    assert posterior.batch_shape == (2,)
    for n in range(2):
        value = torch.as_tensor(posterior.samples["middle"][:, n])
        alone = smollm2(beginnings[n], max_tokens=8, stop=".").log_prob(value)
        alone = alone + smollm2(beginnings[n], value).log_prob(smollm2.encode(endings[n]))
        torch.testing.assert_close(torch.as_tensor(posterior.log_joint[:, n]), alone.double(), atol=2e-3, rtol=0)
