"""simulate(): sets of simulated pairs, saved and read back, as data of training and of evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import Story

from llmppl import LM, Evaluation, SimulatedSet, exact_posterior, fit, held_out_gain, importance, simulate
from llmppl.guides import AutoregressiveGuide, PromptGuide
from llmppl.objectives import TrajectoryBalance, WakeSleep
from llmppl.programs.simulated_pair import SimulatedPair

DATA = [("ab", "cd"), ("ba", "dc"), ("cc", "ae")]


def test_pairs_follow_the_programs_joint(story: Story) -> None:
    """Frequencies of 3000 middles by chi-square against the enumerated prior, four deviations."""
    pairs = simulate(story.program, [("ab", "cd")], 3000, seed=0, progress=False)
    texts = story.prior().enumerate_support()
    p = story.prior().log_prob(texts).exp()
    count = (pairs.latents["middle"][:, None] == texts).all(-1).sum(0).double()
    common = p * 3000 > 5
    statistic = float((((count - 3000 * p) ** 2) / (3000 * p))[common].sum())
    assert statistic < int(common.sum()) + 4 * math.sqrt(2 * int(common.sum()))
    assert pairs.observations["ending"].shape == (3000, 2), "as many tokens as the observed ending"


def test_a_set_is_saved_read_back_and_reproduced(story: Story, tmp_path: Path) -> None:
    first = simulate(story.program, DATA, 7, batch_size=3, seed=1, folder=tmp_path / "set", progress=False)
    again = simulate(story.program, DATA, 7, batch_size=3, seed=1, folder=tmp_path / "set", progress=False)
    fresh = simulate(story.program, DATA, 7, batch_size=3, seed=1, progress=False)
    other = simulate(story.program, DATA, 7, batch_size=3, seed=2, progress=False)
    for found in (again, fresh):
        assert found.args == first.args
        torch.testing.assert_close(found.latents, first.latents, rtol=0, atol=0)
        torch.testing.assert_close(found.observations, first.observations, rtol=0, atol=0)
    assert not torch.equal(other.latents["middle"], first.latents["middle"])
    assert sorted(set(first.args)) == sorted(DATA), "every argument tuple before any is used again"
    assert isinstance(first[2], SimulatedPair)
    assert first[2] == first.args[2]
    assert len(first[2:5]) == 3
    assert repr(first) == "SimulatedSet(7 pairs of middle, ending observed)"


def test_a_set_in_a_folder_is_the_one_that_is_asked_for(story: Story, tmp_path: Path) -> None:
    """Else held-out pairs that are kept beside the training's would be the training's."""
    first = simulate(story.program, DATA, 4, seed=1, folder=tmp_path, progress=False)
    assert simulate(story.program, lambda count: DATA, 4, seed=1, folder=tmp_path, progress=False).args == first.args
    with pytest.raises(ValueError, match="drawn with seed=1, and seed=2 is asked for"):
        simulate(story.program, DATA, 4, seed=2, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="of other arguments than those of data="):
        simulate(story.program, [("ba", "b")], 4, seed=1, folder=tmp_path, progress=False)

    def other(beginning: str, ending: str) -> None:
        text = pyro.sample("other", story.prior(beginning))
        pyro.sample("ending", story.lm(beginning, text), obs=story.lm.encode(ending))

    with pytest.raises(ValueError, match="of sites .'ending', 'middle'., and the program has .'ending', 'other'."):
        simulate(other, DATA, 4, seed=1, folder=tmp_path, progress=False)


def test_what_cannot_be_read_or_simulated_is_refused(story: Story, tmp_path: Path) -> None:
    simulate(story.program, DATA, 4, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds a simulated set of 4 pairs, and num_pairs=5"):
        simulate(story.program, DATA, 5, folder=tmp_path, progress=False)
    content = (tmp_path / "pairs.safetensors").read_bytes()
    (tmp_path / "pairs.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged or no simulated set"):
        SimulatedSet.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no simulated set in"):
        SimulatedSet.load(tmp_path / "nowhere")

    def with_a_factor(x: str) -> None:
        story.prior(x)
        pyro.sample("z", story.prior(x))
        pyro.factor("hard", torch.tensor(0.0))

    def without_observation(x: str) -> None:
        pyro.sample("z", story.prior(x))

    with pytest.raises(ValueError, match="a factor cannot be simulated"):
        simulate(with_a_factor, [("ab",)], 2, progress=False)
    with pytest.raises(ValueError, match="the program observes nothing"):
        simulate(without_observation, [("ab",)], 2, progress=False)
    with pytest.raises(TypeError, match="Evaluation.pairs must be simulated pairs"):
        Evaluation(pairs=DATA)  # type: ignore[arg-type]


@pytest.mark.long
def test_sleep_on_a_stored_set_trains_the_posterior_and_the_gain_shows_it(story: Story) -> None:
    pairs = simulate(story.program, [("ab", "cd")], 512, seed=0, progress=False)
    unseen = simulate(story.program, [("ab", "cd")], 128, seed=1, progress=False)
    guide = AutoregressiveGuide(story.program, story.lm, rank=4, seed=0)
    history = fit(
        story.program,
        guide,
        pairs,
        WakeSleep(1, insomnia=0.0),
        steps=60,
        batch_size=64,
        vectorize_data=True,
        learning_rate=2e-2,
        seed=0,
        progress=False,
        evaluation=Evaluation(pairs=unseen, every=20),
    )
    gains = [item.gain for item in history.evaluations]
    assert gains[-1] > gains[0] + 1.0
    assert gains[-1] > 0, "better than the prior"
    assert "held-out gain" in repr(history)
    assert all(math.isnan(item.gap) for item in history.evaluations), "no data were given"
    exact = exact_posterior(story.program)("ab", "cd")
    found = importance(story.program, guide, 400, progress=False)("ab", "cd")
    assert float(found.ess) > 40
    assert abs(float(found.log_evidence - exact.log_evidence)) < 0.3


def test_patience_rests_on_the_gain(story: Story) -> None:
    """With a rate that ruins the guide the parameters of the best gain are put back."""
    pairs = simulate(story.program, [("ab", "cd")], 32, seed=0, progress=False)
    unseen = simulate(story.program, [("ab", "cd")], 64, seed=1, progress=False)
    guide = AutoregressiveGuide(story.program, story.lm, rank=4, seed=0)
    evaluation = Evaluation(pairs=unseen, every=5, patience=2)
    history = fit(story.program, guide, pairs, WakeSleep(1, insomnia=0.0), steps=200, batch_size=8,
                  vectorize_data=True, learning_rate=0.3, seed=0, progress=False, evaluation=evaluation)  # fmt: skip
    gains = {item.step: item.gain for item in history.evaluations}
    assert history.restored == max(gains, key=lambda step: gains[step])
    assert max(gains) < 200


def test_balance_objectives_train_on_the_sets_observations(story: Story) -> None:
    pairs = simulate(story.program, DATA, 6, seed=0, progress=False)
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    for vectorized in (False, True):
        history = fit(story.program, guide, pairs, TrajectoryBalance(4), steps=2, batch_size=3,
                      vectorize_data=vectorized, progress=False)  # fmt: skip
        assert np.isfinite(history.loss).all()


def test_a_hard_condition_leaves_the_gain_and_tells_the_share_of_impossible_draws(story: Story) -> None:
    lm = story.lm

    def program(beginning: str, count: float) -> None:
        text = pyro.sample("text", lm(beginning, max_tokens=3, stop="."))
        pyro.sample("count", dist.Delta((text == 2).sum(-1).double()), obs=torch.as_tensor(count).double())

    guide = PromptGuide(program, lm, prompt={"text": lambda beginning: [beginning]})
    posterior = importance(program, guide, 200, progress=False)("ab", 2.0)
    assert 0 < int(posterior.impossible) < 200
    assert f"{int(posterior.impossible)} draws impossible" in repr(posterior)
    assert float(posterior.khat) == -math.inf, "those that are possible all have one weight"


@pytest.mark.long
def test_a_defensive_share_is_exact_and_bounds_the_weights(story: Story) -> None:
    """Ẑ / Z over 120 runs of 16 samples is 1 within four standard errors; no weight is above the likelihood over the
    share."""
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    exact = exact_posterior(story.program)(*story.args)
    found = []
    for seed in range(120):
        pyro.set_rng_seed(seed)
        posterior = importance(story.program, guide, 16, progress=False, defensive=0.25)(*story.args)
        assert posterior.num_samples == 16
        likelihood = posterior.log_likelihood["ending"]
        assert bool((posterior.log_weights <= likelihood - math.log(0.25) + 1e-6).all())
        found.append(float(np.exp(posterior.log_evidence - exact.log_evidence)))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - 1) < 4 * error < 0.5
    with pytest.raises(ValueError, match=r"defensive=1\.0 is a share"):
        importance(story.program, guide, 16, defensive=1.0)


def test_a_stream_never_repeats_itself_and_is_the_same_when_resumed(story: Story) -> None:
    stream = simulate(story.program, DATA, batch_size=4, seed=3)
    first = stream.draw(6) + stream.upcoming(3)
    again = simulate(story.program, DATA, batch_size=4, seed=3)
    again.draw(5)
    assert [tuple(pair) for pair in again.draw(4)] == [tuple(pair) for pair in first[5:9]]
    for mine, others in zip(
        again._blocks[1], simulate(story.program, DATA, batch_size=4, seed=3)._block(1), strict=True
    ):
        torch.testing.assert_close(dict(mine.latents), dict(others.latents), rtol=0, atol=0)
    assert sorted(tuple(pair) for pair in first[:3]) == sorted(DATA), "every argument tuple before any is used again"
    blocks = [stream._block(n).latents["middle"] for n in range(2)]
    assert not torch.equal(*blocks), "fresh"
    with pytest.raises(ValueError, match="a stream of fresh pairs is not kept in a folder"):
        simulate(story.program, DATA, folder="somewhere")
    with pytest.raises(ValueError, match="observes nothing"):
        simulate(lambda beginning: pyro.sample("z", story.lm(beginning, max_tokens=2)), [("ab",)])


def test_fit_on_a_stream_resumes_bit_for_bit_and_asks_for_new_arguments(story: Story, tmp_path: Path) -> None:
    asked = []

    def more(count: int) -> list[tuple[str, str]]:
        asked.append(count)
        return [("abcde"[int(n)], "cd") for n in torch.randint(5, (count,))]

    def run(folder: Path, steps: int, resume: bool) -> torch.Tensor:
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        fit(story.program, guide, simulate(story.program, more, batch_size=8, seed=1), WakeSleep(1, insomnia=0.0),
            steps=steps, batch_size=3, vectorize_data=True, learning_rate=1e-2, seed=0, progress=False,
            folder=folder, checkpoint_every=2, resume=resume)  # fmt: skip
        return torch.cat([p.detach().flatten() for p in guide.parameters()])

    whole = run(tmp_path / "whole", 6, False)
    run(tmp_path / "parts", 4, False)
    assert torch.equal(run(tmp_path / "parts", 6, True), whole)
    assert set(asked) == {1, 8}


def test_pairs_that_are_read_too_often_are_told_of(story: Story) -> None:
    pairs = simulate(story.program, DATA, 4, seed=0, progress=False)

    def train(**options: object) -> object:
        guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
        return fit(story.program, guide, pairs, WakeSleep(1, insomnia=0.0), batch_size=2, vectorize_data=True,
                   progress=False, seed=0, **options)  # fmt: skip

    with pytest.warns(UserWarning, match=r"each of the 4 stored pairs is read 2\.5 times"):
        history = train(steps=5)
    assert "each pair read 2.5 times" in repr(history)
    # Twice is well, and whoever watches the gain needs no warning.
    train(steps=4)
    train(steps=5, evaluation=Evaluation(pairs=simulate(story.program, DATA, 2, seed=9, progress=False)))


def test_a_gain_that_parts_from_the_loss_is_told_of_once(story: Story) -> None:
    """Eight pairs, read until they are known by heart: the loss falls, and the gain on unseen ones with it."""
    pairs = simulate(story.program, DATA, 8, seed=0, progress=False)
    unseen = simulate(story.program, DATA, 96, seed=1, progress=False)
    guide = AutoregressiveGuide(story.program, story.lm, rank=4, seed=0)
    with pytest.warns(UserWarning, match="the held-out gain has fallen by .* learns its pairs by heart") as said:
        history = fit(story.program, guide, pairs, WakeSleep(1, insomnia=0.0), steps=80, batch_size=8,
                      vectorize_data=True, learning_rate=2e-2, seed=0, progress=False,
                      evaluation=Evaluation(pairs=unseen, every=10))  # fmt: skip
    assert len(said) == 1
    gains = {item.step: item.gain for item in history.evaluations}
    best = max(gains, key=lambda step: gains[step])
    assert history.parted is not None
    assert history.parted > best
    assert f"from step {history.parted} on the held-out gain fell" in repr(history)
    assert np.mean(history.loss[-10:]) < np.mean(history.loss[:10])


@pytest.mark.long
def test_kl_is_the_mutual_information_less_the_gain(story: Story) -> None:
    """With log Z by enumeration, against KL(p(z|x)‖q) by enumeration, averaged over 1500 simulated endings: within four
    standard errors of their paired difference."""
    pairs = simulate(story.program, [("ab", "cd")], 1500, seed=0, progress=False)
    guide = AutoregressiveGuide(story.program, story.lm, rank=2, seed=0)
    endings = pairs.observations["ending"]
    texts = story.prior().enumerate_support()
    joint = story.prior().log_prob(texts)[:, None] + story.lm("ab", texts[:, None]).log_prob(endings)
    log_evidence = joint.logsumexp(0)
    found = held_out_gain(story.program, guide, pairs, log_evidence=log_evidence.tolist())
    with torch.no_grad():
        rows = [
            pyro.poutine.trace(guide).get_trace("ab", story.lm.decode(e)).nodes["middle"]["fn"] for e in endings[:40]
        ]
        exact = torch.stack(
            [((joint[:, n] - log_evidence[n]).exp() * (joint[:, n] - log_evidence[n] - fn.log_prob(texts))).sum()
             for n, fn in enumerate(rows)]
        )  # fmt: skip
    short = held_out_gain(story.program, guide, pairs[:40], log_evidence=log_evidence[:40].tolist())
    own = torch.from_numpy(short.information - short.values)
    assert abs(float((own - exact).mean())) < 4 * float((own - exact).std() / 40**0.5)
    assert found.kl == pytest.approx(found.mutual_information - found.mean)
    assert found.kl > 0.3
    assert "of the mutual information" in repr(found)
    history = fit(story.program, guide, pairs[:8], WakeSleep(1, insomnia=0.0), steps=1, batch_size=2, progress=False,
                  vectorize_data=True, seed=0, evaluation=Evaluation(
                      pairs=pairs[:40], pairs_log_evidence=log_evidence[:40].tolist(), every=1))  # fmt: skip
    assert history.evaluations[0].kl_p_q == pytest.approx((short.kl, short.kl), abs=1e-6)
    with pytest.raises(ValueError, match="pairs_log_evidence has 3 values of log Z for 8 pairs"):
        Evaluation(pairs=pairs[:8], pairs_log_evidence=[0.0] * 3)


def test_a_program_with_a_plate_of_its_own_is_refused(lm: LM) -> None:
    """Its rows would be taken for those of the data."""

    def program(beginning: Any, ending: Any) -> None:
        with pyro.plate("inner", 3):
            middle = pyro.sample("middle", lm(beginning, max_tokens=2, stop="."))
            pyro.sample("ending", lm(middle, max_tokens=2), obs=lm.encode(ending))

    with pytest.raises(ValueError, match="the program has a plate of its own"):
        simulate(program, [("a", "bb"), ("b", "bb"), ("c", "bb")], num_pairs=3, progress=False)
