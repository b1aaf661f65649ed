"""Regularisation of a training run: whom it reaches, whom it does not, and that runs with it resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from conftest import Story
from long_run import train
from pyro.infer import Trace_ELBO
from test_long_runs import same, same_run
from test_objectives import gradient, perturbed
from torch import Tensor

from llmppl import LM, Behaviour, Evaluation, Regularisation, fit, importance
from llmppl.guides import AutoregressiveGuide, GFlowNetGuide, PromptGuide
from llmppl.network.adapters import GradientDropout
from llmppl.network.random_states import randomness_kept
from llmppl.objectives import LeaveOneOutELBO, SubTrajectoryBalance, TrajectoryBalance, WakeSleep
from llmppl.programs.particles import Particles
from llmppl.programs.plates import in_data_plate
from llmppl.training.regularisation import Regularised

DATA = [("ab", "cdabedcbadce"), ("cde", "aedcbabcdeab"), ("d", "ebdcaedbcaed"), ("aa", "bbbacdecdaba")]


class Watching(TrajectoryBalance):
    """Notes the particles of every call."""

    def __init__(self, num_particles: int = 2, **options: Any) -> None:
        super().__init__(num_particles, **options)
        self.noted: list[Particles] = []

    def _particles(self, *args: Any, **kwargs: Any) -> Particles:
        self.noted.append(super()._particles(*args, **kwargs))
        return self.noted[-1]


def run(story: Story, objective: Any, guide: Any = None, **options: Any) -> Any:
    guide = guide or AutoregressiveGuide(story.program, story.lm, rank=1, seed=0)
    options = {"data": DATA, "steps": 4, "batch_size": 4, "vectorize_data": True, "seed": 0, **options}
    return fit(guide.model, guide, objective=objective, progress=False, **options)


def told(particles: Particles, site: str = "middle") -> Tensor:
    """The guide's context, the observed text first, of every particle and row."""
    context = particles.guide_trace.nodes[site]["fn"].context
    return context.reshape(len(particles.log_p), -1, context.shape[-1])


def observed(particles: Particles, site: str = "ending") -> Tensor:
    value = particles.model_trace.nodes[site]["value"]
    return value.reshape(-1, value.shape[-1])


def exact_joint(story: Story, particles: Particles, beginnings: list[str]) -> Tensor:
    """Of the particles with the observations of the model's trace, from the distributions directly."""
    middle, ending = particles.model_trace.nodes["middle"]["value"], observed(particles)
    middle = middle.reshape(len(middle), len(beginnings), -1)
    joint = story.lm(beginnings, max_tokens=3, stop=".").log_prob(middle)
    return (joint + story.lm(beginnings, middle).log_prob(ending)).reshape(particles.log_p.shape)


# --- input noise ---------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("vectorize_data", [True, False])
def test_noise_has_its_rate_and_reaches_the_guide_only(story: Story, vectorize_data: bool) -> None:
    objective = Watching()
    run(story, objective, steps=25 if vectorize_data else 6, vectorize_data=vectorize_data,
        regularisation=Regularisation(input_noise=0.3))  # fmt: skip
    true = {story.lm.decode(story.lm.encode(e)): b for b, e in DATA}
    pairs = []
    for particles in objective.noted:
        texts = story.lm.decode(observed(particles))
        assert set(texts) <= set(true)  # the program observes the data
        beginnings = [true[text] for text in texts]
        torch.testing.assert_close(particles.log_p, exact_joint(story, particles, beginnings))
        contexts = told(particles)
        assert bool((contexts == contexts[:1]).all())  # one noise for all particles of an x
        pairs.append(torch.stack([contexts[0, :, :12], observed(particles)]))
        own = contexts[0, :, 12:].tolist()
        assert [[t for t in row if t >= 0] for row in own] == [story.lm.encode(b).tolist() for b in beginnings]
    noisy, clean = torch.cat(pairs, 1)
    changed = noisy != clean
    # 1200 or 288 tokens: four standard errors.
    assert abs(float(changed.double().mean()) - 0.3) < 4 * (0.21 / changed.numel()) ** 0.5
    moves = ((noisy - clean) % 6)[changed]
    counts = torch.bincount(moves, minlength=6)[1:].double()
    assert float(((counts - counts.mean()).square() / counts.mean()).sum()) < 18.5  # 0.999 quantile, 4 d.o.f.
    # Fresh for every x and step.
    masks = {tuple(row) for row in changed.tolist()}
    assert len(masks) > 0.9 * len(changed)


def test_noise_reaches_prompts_and_what_the_program_passes_on(lm: LM) -> None:
    seen: list[Any] = []

    def program(beginning: str, ending: str) -> None:
        early = pyro.sample("early", lm(beginning), obs=lm.encode("abcd"))
        middle = pyro.sample("middle", lm(early, max_tokens=2))
        with pyro.plate("rows", 3):
            pyro.sample("ending", lm(beginning, middle), obs=lm.encode([ending, ending[1:], "abcdeabcde"]))

    def prompt(beginning: Any, ending: Any) -> list[Any]:
        seen.append((beginning, ending))
        return [ending, beginning] if isinstance(ending, str) else [ending[0], beginning]

    objective = Watching()
    guide = AutoregressiveGuide(program, lm, rank=1, seed=0)
    noise = Regularisation(input_noise=0.5)
    fit(program, guide, [DATA[0]], objective, 6, seed=0, progress=False, regularisation=noise)
    early, ending = lm.encode("abcd"), lm.encode([DATA[0][1], DATA[0][1][1:], "abcdeabcde"])
    differing = torch.zeros(3, dtype=torch.bool)
    for particles in objective.noted:
        tokens = [t for t in told(particles)[0, 0].tolist() if t >= 0]
        # "early", the three rows of "ending", then the prior's context: "early" again, noised alike.
        assert len(tokens) == 4 + 33 + 4
        assert tokens[:4] == tokens[-4:]
        differing[0] |= tokens[:4] != early.tolist()
        rows = [tokens[4:16], tokens[16:27], tokens[27:37]]
        true = [[t for t in row if t >= 0] for row in ending.tolist()]
        changes = [sum(a != b for a, b in zip(r, t, strict=True)) for r, t in zip(rows, true, strict=True)]
        differing[1] |= min(changes) > 0  # every row has its own
        differing[2] |= [a != b for a, b in zip(rows[0][1:], true[0][1:], strict=True)] != [
            a != b for a, b in zip(rows[1], true[1], strict=True)
        ]
        assert particles.model_trace.nodes["early"]["value"].tolist() == early.tolist()
    assert bool(differing.all())

    fit(program, AutoregressiveGuide(program, lm, {"middle": prompt}, rank=1), [DATA[0]], objective, 2, seed=0,
        progress=False, regularisation=noise)  # fmt: skip
    # Of the structure's check and of the steps: the argument of the site's name is the noised text.
    assert all(beginning == "ab" for beginning, _ in seen)
    assert not any(isinstance(ending, str) for _, ending in seen[-2:])
    assert not torch.equal(seen[-1][1], ending)


def test_noise_is_one_for_all_passes_of_a_call(story: Story) -> None:
    """The learned log-partition has the true x, and an objective that runs the guide twice the same noise."""
    guide = GFlowNetGuide(story.program, story.lm, rank=1, seed=0)
    with torch.no_grad():
        guide.head.weight.fill_(1.0)
    noise = Regularised(Regularisation(input_noise=0.5), story.program, guide, guide, WakeSleep(2), DATA[0])
    with noise.call(DATA[0], False) as (_, first), noise.call(DATA[0], False) as (_, second):
        contexts = []
        for proposal in (first, first, second):
            trace = pyro.poutine.trace(proposal).get_trace(*DATA[0])
            contexts.append(trace.nodes["middle"]["fn"].context.tolist())
        assert contexts[0] == contexts[1] != contexts[2]
        assert torch.equal(first.log_partition(*DATA[0]), guide.log_partition(*DATA[0]))  # type: ignore[attr-defined]


# --- adapter dropout -----------------------------------------------------------------------------


def dropped(story: Story, objective: Any, dropout: float, **options: Any) -> Any:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2, seed=0))
    pyro.clear_param_store()
    return run(story, objective, guide, regularisation=Regularisation(adapter_dropout=dropout), **options), guide


def identity(guide: AutoregressiveGuide) -> bool:
    layers = guide.lm.adapters.lora_layers(guide.adapter)
    return bool(layers) and all(isinstance(layer.lora_dropout[guide.adapter], torch.nn.Identity) for layer in layers)


def test_dropout_drops_its_share_where_gradients_are_recorded() -> None:
    module, states = GradientDropout(0.25), torch.ones(100, 200)
    out = module(states)
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.013  # four standard errors
    assert float(out.max()) == pytest.approx(1 / 0.75)
    with torch.no_grad():
        assert torch.equal(module(states), states)


@pytest.mark.parametrize(
    "objective",
    [
        lambda: TrajectoryBalance(3),
        lambda: TrajectoryBalance(4, behaviour=Behaviour(tempered=0.3, replayed=0.3)),
        lambda: SubTrajectoryBalance(3),
        lambda: LeaveOneOutELBO(3),
        lambda: WakeSleep(3, insomnia=1.0),
    ],
    ids=["TB", "TB, off-policy", "SubTB", "leave-one-out", "wake"],
)
def test_weights_are_those_of_the_law_that_drew(story: Story, objective: Any) -> None:
    plain, _ = dropped(story, objective(), 0.0, steps=1)
    noisy, guide = dropped(story, objective(), 0.5, steps=1)
    # The first step's particles are the same, and so are their weights; the gradients are not.
    assert noisy.elbo == pytest.approx(plain.elbo, abs=1e-9)
    assert noisy.ess == pytest.approx(plain.ess, abs=1e-9)
    assert abs(noisy.gradient_norm[0] - plain.gradient_norm[0]) > 1e-3
    assert abs(noisy.loss[0] - plain.loss[0]) > 1e-3
    assert identity(guide)


def test_replayed_weights_are_those_of_the_law_that_drew(story: Story) -> None:
    buffers = []
    for dropout in (0.0, 0.5):
        behaviour = Behaviour(replayed=0.25)
        dropped(story, SubTrajectoryBalance(4, behaviour=behaviour), dropout, steps=1)
        assert behaviour.buffer is not None
        buffers.append([entry.log_weight for x in DATA for entry in behaviour.buffer.of(*x)])
    assert buffers[0] == pytest.approx(buffers[1], abs=1e-9)


def test_wake_trains_with_weights_of_the_law_that_drew(story: Story) -> None:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2, seed=0))
    objective = WakeSleep(4, insomnia=1.0)
    with guide.lm.adapters.dropping(guide.adapter, 0.5):
        pyro.set_rng_seed(1)
        found = gradient(objective.differentiable_loss(story.program, guide, *story.args), guide)
        pyro.set_rng_seed(1)
        particles = objective._particles(story.program, guide, story.args, {})
    # The law that drew, anew: without dropout now.
    fn = particles.guide_trace.nodes["middle"]["fn"]
    fn = fn.with_context(fn.context, fn.adapter)
    middles = particles.guide_trace.nodes["middle"]["value"]
    with torch.no_grad():
        weights = (particles.log_p - fn.log_prob(middles)).softmax(0)
    expected = gradient(-(weights * particles.log_q).sum(), guide)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_leave_one_out_is_half_of_vargrad_under_dropout_too(story: Story) -> None:
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2, seed=0))
    found = []
    with guide.lm.adapters.dropping(guide.adapter, 0.4):
        for objective in (TrajectoryBalance(6), LeaveOneOutELBO(6)):
            pyro.set_rng_seed(1)
            found.append(gradient(objective.differentiable_loss(story.program, guide, *story.args), guide))
    torch.testing.assert_close(found[0], 2 * found[1])


def test_particles_are_scored_by_one_thinned_network(story: Story) -> None:
    """Equal texts have one score, and the scores of all texts are a normalised law."""
    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2, seed=0))
    prior = story.prior()
    fn = prior.with_context(story.lm.context("cd", "ab"), guide.adapter)
    texts = prior.enumerate_support()
    plain = fn.log_prob(texts).detach()
    with guide.lm.adapters.dropping(guide.adapter, 0.5):
        noisy = fn.log_prob(torch.cat([texts, texts])).detach()
        with torch.no_grad():
            torch.testing.assert_close(fn.log_prob(texts), plain)
    assert torch.equal(noisy[: len(texts)], noisy[len(texts) :])
    assert abs(float(noisy[: len(texts)].logsumexp(0))) < 1e-9
    assert float((noisy[: len(texts)] - plain).abs().max()) > 0.05


def test_dropout_is_off_outside_the_gradient_pass_and_restored(story: Story) -> None:
    scores: list[Tensor] = []

    def watch(step: int, history: Any) -> None:
        assert identity(guide)
        assert not guide.lm.adapters.drops(guide.adapter)
        fn = story.prior().with_context(story.lm.context("cd", "ab"), guide.adapter)
        scores.extend(fn.log_prob(story.lm.encode("ab.")) for _ in range(2))  # with gradients

    guide = perturbed(AutoregressiveGuide(story.program, story.lm, rank=2, seed=0))
    evaluation = Evaluation(DATA[:2], every=2, num_samples=5, simulations=0)
    options = {"regularisation": Regularisation(adapter_dropout=0.5, input_noise=0.4), "evaluation": evaluation}
    history = run(story, TrajectoryBalance(3), guide, callback=watch, steps=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True))
    with randomness_kept(evaluation.seed):
        posterior = importance(story.program, guide, 5, vectorize_data=True, progress=False)(
            *map(list, zip(*DATA[:2], strict=True))
        )
    assert history.evaluations[-1].elbo == float(posterior.elbo.mean())

    class Failing(TrajectoryBalance):
        def differentiable_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            super().differentiable_loss(*args, **kwargs)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run(story, Failing(3), guide, **options)
    assert identity(guide)
    assert not guide.lm.adapters.drops(guide.adapter)


# --- simulated x ---------------------------------------------------------------------------------


def test_the_stated_share_of_the_steps_is_simulated(story: Story) -> None:
    objective = Watching(behaviour=Behaviour(replayed=0.5))
    guide = AutoregressiveGuide(story.program, story.lm, rank=1, seed=0)
    regularisation = Regularisation(simulated=0.4)
    regularised = Regularised(regularisation, story.program, guide, guide, objective, DATA[0])
    share = sum(regularised.simulates() for _ in range(2000)) / 2000
    assert abs(share - 0.4) < 0.044  # four standard errors

    run(story, objective, guide, steps=12, accumulate=2, batch_size=2, regularisation=regularisation)
    endings = {ending: beginning for beginning, ending in DATA}
    fresh = []
    for particles in objective.noted:
        texts = story.lm.decode(observed(particles))
        fresh.append([text not in endings for text in texts])
        # Twelve simulated tokens hit none of the data by chance. A minibatch is simulated as a whole.
        assert len(set(fresh[-1])) == 1
        # The guide is told what the program observes.
        assert told(particles)[0, :, :12].tolist() == observed(particles).tolist()
    flags = [row[0] for row in fresh]
    assert flags[::2] == flags[1::2]  # both minibatches of a step
    assert 1 <= sum(flags[::2]) <= 10
    # The buffer holds configurations of the data only, with their own joint.
    buffer = objective.behaviour.buffer
    assert buffer is not None
    for beginning, ending in DATA:
        for entry in buffer.of(beginning, ending):
            middle = entry.values["middle"]
            joint = story.prior(beginning).log_prob(middle) + story.lm(beginning, middle).log_prob(
                story.lm.encode(ending)
            )
            assert entry.log_joint == pytest.approx(float(joint), abs=1e-6)
    names = buffer.state_dict()["entries"]
    assert sum(map(len, names.values())) <= 2 * 2 * 2 * (12 - sum(flags[::2]))


def test_simulated_x_has_the_programs_law_and_its_own_latent_is_not_among_the_particles(story: Story) -> None:
    """Over 600 rows of one plate; the program's law of the first token by enumeration."""
    objective = Watching(3)
    guide = AutoregressiveGuide(story.program, story.lm, rank=1, seed=0)
    args = (["ab"] * 600, ["cd"] * 600)
    model, proposal = in_data_plate(story.program), in_data_plate(guide)
    regularised = Regularised(Regularisation(simulated=1.0), model, proposal, guide, objective, args)
    with regularised.call(args, True) as (program, told_guide), torch.no_grad():
        objective.loss(program, told_guide, *args)
    particles = objective.noted[0]
    torch.testing.assert_close(particles.log_p, exact_joint(story, particles, args[0]))
    prior = story.prior()
    texts = prior.enumerate_support()
    law = story.lm("ab", texts[:, None]).log_prob(torch.arange(6)[:, None]) + prior.log_prob(texts)[:, None]
    expected = 600 * law.logsumexp(0).exp()
    counts = torch.bincount(observed(particles)[:, 0], minlength=6)
    assert float(((counts - expected).square() / expected).sum()) < 20.5  # 0.999 quantile, 5 d.o.f.
    # Draws of the guide have the larger log q on average, by a KL; the program's own latents the larger log p.
    middle = particles.guide_trace.nodes["middle"]["value"]
    excess = (prior.log_prob(middle) - particles.log_q).mean(1)
    assert float(excess.max()) < -0.2, excess


@pytest.mark.parametrize("objective", [lambda: WakeSleep(3), lambda: Watching(3, behaviour=Behaviour(sleep=1.0))])
def test_it_goes_together_with_sleep(story: Story, objective: Any) -> None:
    watched = objective()
    history = run(
        story, watched, regularisation=Regularisation(simulated=0.5, input_noise=0.2, adapter_dropout=0.1), steps=3
    )
    assert all(map(torch.isfinite, torch.tensor(history.loss)))
    for particles in getattr(watched, "noted", []):
        share = (told(particles)[0, :, :12] != observed(particles)).double().mean()
        assert 0 < share < 0.5  # noise on what sleep simulated, not on the data


# --- the run -------------------------------------------------------------------------------------

ALL = Regularisation(input_noise=0.3, adapter_dropout=0.3, simulated=0.5)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"vectorize_data": False, "objective": lambda: SubTrajectoryBalance(3, behaviour=Behaviour(0.3, 0.3, 0.3))},
    ],
    ids=["learned, accumulated, evaluated", "one by one, replayed"],
)
def test_a_regularised_run_resumes_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    options = {"checkpoint_every": 100, "regularisation": ALL, **changes}
    straight = train(str(tmp_path / "a"), steps=4, **options)
    train(str(tmp_path / "b"), steps=2, **options)
    torch.rand(7)
    same_run(straight, train(str(tmp_path / "b"), steps=4, resume=True, **options))
    other = {**options, "regularisation": Regularisation(0.3, 0.2, 0.5)}
    with pytest.raises(ValueError, match="its regularisation's adapter_dropout is 0.3, this one's is 0.2"):
        train(str(tmp_path / "b"), steps=5, resume=True, **other)
    # Each of them makes it another run.
    plain = train(None, steps=4, **{**options, "regularisation": None})
    assert plain[1].loss != straight[1].loss


def test_seeds_reproduce_and_nothing_of_it_leaves_a_run_as_it_was() -> None:
    options = {"steps": 2, "evaluation": None}
    same_run(train(regularisation=ALL, **options), train(regularisation=ALL, **options))
    plain = train(**options)
    same_run(plain, train(regularisation=Regularisation(), **options))
    for one in (Regularisation(input_noise=0.5), Regularisation(simulated=0.9), Regularisation(adapter_dropout=0.5)):
        with pytest.raises(AssertionError):
            same(train(regularisation=one, **options)[0].tensors(), plain[0].tensors())
    state = Regularisation(input_noise=0.5).settings()
    assert state == {"input_noise": 0.5}


def test_mistakes_are_named(story: Story, lm: LM) -> None:
    for settings, message in [
        ({"input_noise": 1.0}, "input_noise=1.0 is a probability below 1"),
        ({"adapter_dropout": -0.1}, "adapter_dropout=-0.1 is a probability"),
        ({"simulated": 1.5}, "simulated=1.5 is a share of the steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            Regularisation(**settings)

    def tasted(beginning: str, ending: str) -> None:
        story.program(beginning, ending)
        pyro.factor("taste", torch.tensor(-1.0))

    def factored(beginning: str, ending: str) -> None:
        pyro.sample("middle", lm(beginning, max_tokens=2))
        pyro.factor("taste", torch.tensor(-1.0))

    def blind(beginning: str, ending: str) -> None:
        pyro.sample("middle", lm(beginning, max_tokens=2))

    def trimmed(start: Any, finish: Any) -> None:
        story.program(start, finish[1:] if isinstance(finish, str) else [text[1:] for text in finish])

    def guide_of(program: Any, **options: Any) -> AutoregressiveGuide:
        return AutoregressiveGuide(program, lm, rank=1, **options)

    def deaf(beginning: str, ending: str) -> None:
        weight = pyro.param("weight", torch.zeros(()))
        pyro.sample("middle", lm(beginning, max_tokens=3, stop=".", temperature=float(weight.detach().exp())))

    frozen = PromptGuide(story.program, lm)
    frozen.free = torch.nn.Parameter(torch.zeros(()))
    noise, simulated, dropout = (Regularisation(**{n: 0.5}) for n in ("input_noise", "simulated", "adapter_dropout"))
    old = {"middle": lambda finish: [finish]}
    untold = {"middle": lambda beginning: [beginning]}
    for program, guide, regularisation, error, message in [
        (story.program, guide_of(story.program), 0.1, TypeError, "regularisation must be a Regularisation, got 0.1"),
        (tasted, guide_of(tasted), simulated, ValueError, r"factor 'taste'.*Regularisation\(simulated=0\)"),
        (blind, guide_of(blind), simulated, ValueError, "observes nothing that could be simulated"),
        (factored, guide_of(factored), noise, ValueError, "the program observes no text. Leave input_noise out"),
        (story.program, deaf, noise, TypeError, "takes no observations= argument"),
        (story.program, deaf, dropout, TypeError, "adapter_dropout=0.5 is dropout on a guide's LoRA layers, and"),
        (story.program, frozen, dropout, TypeError, "PromptGuide has none"),
        (trimmed, guide_of(trimmed, prompt=old), noise, ValueError, r"'finish', .*Ask for the site 'ending' instead"),
        (trimmed, guide_of(trimmed, prompt=old), simulated, ValueError, "Ask for the site 'ending' instead"),
        (story.program, guide_of(story.program, prompt=untold), noise, ValueError, r"no prompt.*\['ending'\]"),
    ]:
        for vectorize in (True, False):
            with pytest.raises(error, match=message):
                fit(program, guide, DATA, TrajectoryBalance(2), 1, batch_size=2, vectorize_data=vectorize,
                    regularisation=regularisation, progress=False)  # fmt: skip
    fit(tasted, guide_of(tasted), DATA, TrajectoryBalance(2), 1, regularisation=noise, progress=False)
    with pytest.raises(TypeError, match="and Trace_ELBO takes its weights from there. Use an objective"):
        run(story, Trace_ELBO(), regularisation=dropout)
    # Data that the chosen prompt does tell under the site's name.
    named = guide_of(trimmed, prompt={"middle": lambda start, ending: [ending, start]})
    fit(trimmed, named, DATA, TrajectoryBalance(2), 1, regularisation=noise, progress=False)
