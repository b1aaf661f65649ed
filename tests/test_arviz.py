"""Posteriors in ArviZ. Runs with arviz 0.23 and with arviz 1.x; needs neither torch nor Pyro.

The posterior is that of a toy whose evidence is a sum over 40 texts: z is at most three tokens of an
alphabet of four, ended by a full stop, and the observed text's likelihood is a table by z.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import arviz
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from llmppl.posterior.posterior import Posterior
from llmppl.posterior.replicates import Replicates

# arviz 0.23's own calls.
pytestmark = pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")

NEW = "InferenceData" not in vars(arviz)
ALPHABET = ".<é\n"
PRIOR = np.array([0.4, 0.3, 0.2, 0.1])
GUIDE = np.array([0.3, 0.2, 0.3, 0.2])
TEXTS = np.array(
    [
        [*body, *([0] if len(body) < 3 else []), *[-1] * (2 - len(body))]
        for length in range(4)
        for body in itertools.product((1, 2, 3), repeat=length)
    ]
)
ELSEWHERE = np.random.default_rng(5).normal(-4.0, 0.8, size=len(TEXTS))
"""log p(x | z), by text."""


def decode(ids: np.ndarray) -> str:
    return "".join(ALPHABET[i] for i in ids if i >= 0)


def scores(law: np.ndarray) -> np.ndarray:
    """Token log-probabilities of every text, zero behind the end."""
    return np.where(TEXTS >= 0, np.log(law)[TEXTS], 0.0)


LOG_PRIOR, LOG_GUIDE = scores(PRIOR).sum(1), scores(GUIDE).sum(1)
LOG_JOINT = LOG_PRIOR + ELSEWHERE
LOG_Z = float(np.log(np.exp(LOG_JOINT).sum()))
POSTERIOR = np.exp(LOG_JOINT - LOG_Z)
LENGTHS = (TEXTS >= 0).sum(1)


def at(index: np.ndarray, **changes: Any) -> Posterior:
    """The samples with these numbers, ``(K,) + batch_shape``, weighted against the guide."""
    fields: dict[str, Any] = {
        "samples": {"middle": TEXTS[index], "rate": index / 40},
        "log_weights": LOG_JOINT[index] - LOG_GUIDE[index],
        "log_joint": LOG_JOINT[index],
        "decoders": {"middle": decode, "ending": decode},
        "observed": {"ending": np.array([2, 1, 0, -1])},
        "token_log_p": {"middle": scores(PRIOR)[index]},
        "token_log_q": {"middle": scores(GUIDE)[index]},
        "log_likelihood": {"ending": ELSEWHERE[index]},
    }
    return Posterior(**{**fields, **changes})


def importance(count: int, *rows: int, seed: int = 0) -> Posterior:
    return at(np.random.default_rng(seed).choice(len(TEXTS), (count, *rows), p=np.exp(LOG_GUIDE)))


def chains(count: int, draws: int, *rows: int) -> Posterior:
    """Chains that have converged: exact draws."""
    index = np.random.default_rng(3).choice(len(TEXTS), (count * draws, *rows), p=POSTERIOR)
    return at(
        index,
        method="mcmc",
        log_weights=np.zeros(index.shape),
        num_chains=count,
        acceptance=np.full((count, *rows), 0.5),
    )


def test_the_toy_is_a_distribution() -> None:
    assert len(TEXTS) == 40
    assert np.exp(LOG_PRIOR).sum() == pytest.approx(1.0)
    assert np.exp(LOG_GUIDE).sum() == pytest.approx(1.0)


def test_a_weighted_posterior_is_resampled_into_one_chain() -> None:
    posterior = importance(4000)
    data = posterior.to_arviz(2000, seed=1)
    assert type(data).__name__ == ("DataTree" if NEW else "InferenceData")
    assert dict(data.posterior.sizes) == {"chain": 1, "draw": 2000, "middle_token": 3}
    assert data.posterior["middle_ids"].dims == ("chain", "draw", "middle_token")
    drawn = posterior.resample(2000, seed=1)
    np.testing.assert_array_equal(data.posterior["middle_ids"][0], drawn.samples["middle"])
    assert data.posterior_text["middle"][0].values.tolist() == drawn.decode("middle")
    np.testing.assert_array_equal(data.posterior["middle_length"][0], (drawn.samples["middle"] >= 0).sum(1))
    # Each draw's scores are its own text's, after resampling too.
    which = (data.posterior["rate"].values[0] * 40).round().astype(int)
    np.testing.assert_array_equal(data.posterior["middle_ids"][0], TEXTS[which])
    np.testing.assert_allclose(data.posterior["log_joint"][0], LOG_JOINT[which])
    np.testing.assert_allclose(data.posterior["log_q"][0], LOG_GUIDE[which])
    np.testing.assert_allclose(data.log_likelihood["ending"][0], ELSEWHERE[which])
    # 2000 draws of weighted samples with an ESS of 1000 or more: 4 standard errors of both together.
    mean = float(data.posterior["middle_length"].mean())
    spread = math.sqrt(POSTERIOR @ LENGTHS**2 - (POSTERIOR @ LENGTHS) ** 2)
    assert posterior.ess > 1000
    assert mean == pytest.approx(POSTERIOR @ LENGTHS, abs=4 * spread * math.sqrt(1 / 1000 + 1 / 2000))
    assert float(data.sample_stats["ess"]) == float(posterior.ess)
    assert float(data.sample_stats["khat"]) == float(posterior.khat)
    assert "log_weight" not in data.sample_stats


def test_weights_stay_beside_the_samples_when_asked_for() -> None:
    posterior = importance(500)
    data = posterior.to_arviz(weighted=True)
    np.testing.assert_array_equal(data.posterior["middle_ids"][0], posterior.samples["middle"])
    stats = data.sample_stats
    np.testing.assert_allclose(stats["log_weight"][0], posterior.log_weights)
    np.testing.assert_allclose(stats["log_p"] - stats["log_q"], stats["log_weight"])
    assert stats["log_weight"].dims == ("chain", "draw")
    weight = np.exp(stats["log_weight"] - stats["log_weight"].max())
    mean = float((weight * data.posterior["middle_length"]).sum() / weight.sum())
    assert mean == pytest.approx(float(posterior.weights @ (posterior.samples["middle"] >= 0).sum(1)))


def test_an_enumerated_posterior_is_weighted_exactly() -> None:
    exact = at(np.arange(len(TEXTS)), log_weights=LOG_JOINT, method="enumeration")
    data = exact.to_arviz(weighted=True)
    np.testing.assert_allclose(np.exp(data.sample_stats["log_weight"][0] - LOG_Z), POSTERIOR)
    assert float(data.sample_stats["log_evidence"]) == pytest.approx(LOG_Z)
    assert "log_q" not in data.posterior
    # Systematic resampling gives each text its share up to one draw.
    drawn = exact.to_arviz(1000)
    counts = np.bincount((drawn.posterior["rate"].values[0] * 40).round().astype(int), minlength=40)
    assert np.abs(counts - 1000 * POSTERIOR).max() <= 1


def test_chains_of_mcmc_stay_chains() -> None:
    posterior = chains(4, 250)
    data = posterior.to_arviz()
    assert dict(data.posterior.sizes) == {"chain": 4, "draw": 250, "middle_token": 3}
    np.testing.assert_array_equal(data.posterior["middle_ids"][2], posterior.samples["middle"][500:750])
    assert data.sample_stats["acceptance_rate"].dims == ("chain",)
    assert "log_evidence" not in data.sample_stats
    # ArviZ's numbers of the joint are the posterior's own, and those of converged chains.
    assert float(arviz.rhat(data)["log_joint"]) == pytest.approx(float(posterior.rhat))
    assert float(arviz.ess(data)["log_joint"]) == pytest.approx(float(posterior.ess))
    assert float(posterior.rhat) < 1.02
    # Independent draws: the estimate of 1000 scatters by a tenth.
    assert 800 < float(posterior.ess) < 1200


def test_chains_that_disagree_are_seen() -> None:
    posterior = chains(2, 200)
    stuck = np.where(np.arange(400) < 200, np.argmax(LOG_JOINT), np.argmin(LOG_JOINT))
    index = np.where(np.arange(400) % 4 == 0, (posterior.samples["rate"] * 40).round().astype(int), stuck)
    apart = at(index, method="mcmc", log_weights=np.zeros(400), num_chains=2)
    assert float(apart.rhat) > 1.5
    assert float(arviz.rhat(apart.to_arviz())["log_joint"]) > 1.5


@pytest.mark.parametrize("method", ["importance", "mcmc"])
def test_batch_rows_are_named_dimensions(method: str) -> None:
    observed = {"ending": np.array([[2, 0], [1, 0], [3, 0]]), "title": np.array([1, 0])}
    decoders = {name: decode for name in ("middle", "ending", "title")}
    posterior = importance(60, 3) if method == "importance" else chains(2, 30, 3)
    posterior.observed, posterior.decoders = observed, decoders
    data = posterior.to_arviz()
    lead = ("chain", "draw", "row_0")
    assert data.posterior["middle_ids"].dims == (*lead, "middle_token")
    assert data.posterior["middle_length"].dims == lead
    assert data.posterior_text["middle"].dims == lead
    assert data.log_likelihood["ending"].dims == lead
    assert data.sample_stats["ess"].dims == ("row_0",)
    assert data.observed_data["ending"].dims == ("row_0", "ending_token")
    assert data.observed_data["title"].dims == ("title_token",)
    assert data.observed_text["ending"].values.tolist() == ["é.", "<.", "\n."]
    assert data.observed_text["title"].item() == "<."
    # Row 1 alone says what row 1 of all says.
    row = posterior.row(1)
    np.testing.assert_allclose(data.sample_stats["ess"][1], row.ess)
    if method == "importance":
        assert data.sample_stats["log_evidence"][1].item() == pytest.approx(float(row.log_evidence))
    else:
        np.testing.assert_array_equal(
            data.posterior["middle_ids"].isel(row_0=1).values.reshape(60, 3), row.samples["middle"]
        )


def test_texts_inside_a_plate_of_the_program_keep_its_dimension() -> None:
    index = np.random.default_rng(0).choice(len(TEXTS), (50, 2))
    samples = {"middle": TEXTS[index]}  # (50, 2, 3): two sentences a sample
    posterior = Posterior(samples, np.zeros(50), np.zeros(50), decoders={"middle": decode})
    data = posterior.to_arviz()
    assert data.posterior["middle_ids"].dims == ("chain", "draw", "middle_dim_0", "middle_token")
    assert data.posterior_text["middle"].dims == ("chain", "draw", "middle_dim_0")
    assert "observed_data" not in list(getattr(data, "children", None) or data.groups())


def test_dimensions_are_named_after_plates_and_labelled() -> None:
    index = np.random.default_rng(0).choice(len(TEXTS), (50, 3, 2))
    samples = {"middle": TEXTS[index]}  # three stories of two sentences
    observed = {"y": np.arange(6.0).reshape(3, 2), "ending": np.array([[2, 0], [1, 0], [3, 0]])}
    posterior = Posterior(
        samples, np.zeros((50, 3)), np.zeros((50, 3)), decoders={"middle": decode, "ending": decode},
        observed=observed, plates=("stories",), dims={"middle": ("sentences",), "y": ("sentences",), "ending": ()},
    )  # fmt: skip
    drawn = {"y": np.random.default_rng(1).normal(size=(40, 3, 2)), "ending": np.ones((40, 3, 4), dtype=int)}
    said = {"decoders": posterior.decoders, "plates": posterior.plates, "dims": posterior.dims, "batch_shape": (3,)}
    predicted = Replicates({}, drawn, True, **said)
    prior = Replicates({"middle": TEXTS[index[:30]]}, {"y": np.zeros((30, 3, 2))}, False, **said)
    data = posterior.to_arviz(coords={"stories": ["a", "b", "c"]}, prior=prior, posterior_predictive=predicted)
    assert data.posterior["middle_ids"].dims == ("chain", "draw", "stories", "sentences", "middle_token")
    assert data.posterior_text["middle"].dims == ("chain", "draw", "stories", "sentences")
    assert data.posterior["stories"].values.tolist() == ["a", "b", "c"]
    assert data.sample_stats["ess"].dims == ("stories",)
    assert data.observed_data["y"].dims == ("stories", "sentences")
    assert data.observed_data["ending_length"].values.tolist() == [2, 2, 2]
    assert data.posterior_predictive["y"].shape == (1, 40, 3, 2)
    assert data.posterior_predictive["ending"].dims == ("chain", "draw", "stories", "ending_token")
    assert data.posterior_predictive["stories"].values.tolist() == ["a", "b", "c"]
    assert data.prior["middle_ids"].sizes["draw"] == data.prior_predictive["y"].sizes["draw"] == 30
    assert data.prior_text["middle"].values[0, 0, 0, 0] == decode(TEXTS[index[0, 0, 0]])
    if NEW:
        assert arviz.plot_ppc_dist(data, var_names=["y"], num_samples=20) is not None
    else:
        assert arviz.plot_ppc(data, var_names=["y"], num_pp_samples=20) is not None
    matplotlib.pyplot.close("all")


@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_two_programs_are_compared_by_leave_one_out_over_the_rows() -> None:
    posterior = importance(2000, 4)
    worse = importance(2000, 4)
    worse.log_likelihood = {"ending": posterior.log_likelihood["ending"] - 1.0}
    table = arviz.compare({"one": posterior.to_arviz(), "two": worse.to_arviz()})
    assert list(table.index) == ["one", "two"]
    # 0.x gives the loss, 1.x the difference with its sign.
    assert abs(float(table.loc["two", "elpd_diff"])) == pytest.approx(4.0, abs=0.1)


def roundtrip(data: Any, path: Path) -> Any:
    data.to_netcdf(str(path))
    return arviz.from_netcdf(str(path))


@pytest.mark.parametrize("weighted", [False, True])
def test_netcdf_keeps_texts_padding_and_infinite_and_undefined_numbers(weighted: bool, tmp_path: Path) -> None:
    posterior = importance(30, 2)
    posterior.log_weights[0] = posterior.log_joint[0] = -np.inf
    posterior.samples["rate"][1, 0] = np.nan
    data = posterior.to_arviz(weighted=weighted)
    again = roundtrip(data, tmp_path / "posterior.nc")
    groups = ["posterior", "posterior_text", "log_likelihood", "sample_stats", "observed_data", "observed_text"]
    for group in groups:
        assert set(again[group].data_vars) == set(data[group].data_vars)
        for name, variable in data[group].data_vars.items():
            assert again[group][name].dims == variable.dims
            # Exactly, NaN and infinities among them; strings come back as objects.
            np.testing.assert_array_equal(again[group][name].values.astype(variable.dtype), variable.values)
    assert (again.posterior["middle_ids"].values == -1).any()
    assert again.posterior["middle_ids"].dtype.kind == "i"
    assert again.observed_text["ending"].item() == "é<."
    if weighted:
        assert np.isneginf(again.sample_stats["log_weight"].values[0, 0]).all()
        # Of an impossible sample the guide's density is unknown here: "rate" has no token scores.
        assert np.isnan(again.sample_stats["log_q"].values[0, 0]).all()


def test_an_impossible_sample_of_texts_alone_has_its_token_scores_for_log_q() -> None:
    index = np.arange(10)
    posterior = at(index, samples={"middle": TEXTS[index]})
    posterior.log_weights[3] = posterior.log_joint[3] = -np.inf
    data = posterior.to_arviz(weighted=True)
    np.testing.assert_allclose(data.sample_stats["log_q"][0], LOG_GUIDE[index])


def test_summary_and_trace_plots_read_it() -> None:
    data = importance(400).to_arviz()
    table = arviz.summary(data, kind="stats")
    assert {"log_joint", "log_q", "middle_length", "rate"} <= set(table.index)
    length = float(data.posterior["middle_length"].mean())
    assert float(table.loc["middle_length", "mean"]) == pytest.approx(length, abs=0.01)
    assert "r_hat" in arviz.summary(chains(4, 100).to_arviz(), var_names=["log_joint", "middle_length"])
    drawn = arviz.plot_trace(chains(2, 100).to_arviz(), var_names=["log_joint", "middle_length"])
    assert drawn is not None
    matplotlib.pyplot.close("all")


def test_leave_one_out_of_one_observation_is_its_evidence() -> None:
    """Without its one observation the posterior is the prior, so PSIS-LOO estimates log p(x) = log Z.

    Within 4 standard errors of the harmonic mean that it smooths, 0.04 nats at 20 000 draws; the log of the
    mean likelihood, a wrong answer, lies further away."""
    exact = at(np.arange(len(TEXTS)), log_weights=LOG_JOINT, method="enumeration")
    found = arviz.loo(exact.to_arviz(20_000), pointwise=False)
    inverse = np.exp(-ELSEWHERE)
    mean = POSTERIOR @ inverse
    error = math.sqrt((POSTERIOR @ inverse**2 / mean**2 - 1) / 20_000)
    assert error < 0.01
    elpd = float(found.elpd if NEW else found.elpd_loo)
    assert elpd == pytest.approx(LOG_Z, abs=4 * error)
    assert abs(math.log(POSTERIOR @ np.exp(ELSEWHERE)) - LOG_Z) > 8 * error


def test_leave_one_out_and_its_khat_go_over_the_rows() -> None:
    found = arviz.loo(importance(500, 4).to_arviz(), pointwise=True)
    assert found.pareto_k.shape == (4,)
    assert arviz.plot_khat(found) is not None
    matplotlib.pyplot.close("all")


@pytest.mark.skipif(not NEW, reason="arviz 0.x has no PSIS-LOO for draws from an approximation")
def test_leave_one_out_of_the_guides_own_samples_takes_log_p_and_log_q() -> None:
    """The samples as the guide drew them; ArviZ weights them by log_p - log_q. Tolerance as above, twice
    over for the weights."""
    data = importance(20_000).to_arviz(weighted=True)
    stats = data.sample_stats
    found = arviz.loo_approximate_posterior(data, log_p=stats["log_p"], log_q=stats["log_q"], pointwise=False)
    assert found.elpd == pytest.approx(LOG_Z, abs=0.08)


@pytest.mark.skipif(NEW, reason="arviz 1.x smooths weights in its submodules only")
def test_pareto_smoothing_of_the_weights_finds_the_posteriors_khat() -> None:
    posterior = at(np.arange(3000) % 40, log_weights=np.random.default_rng(2).normal(0, 1.5, size=3000))
    data = posterior.to_arviz(weighted=True)
    _, khat = arviz.psislw(data.sample_stats["log_weight"].stack(__sample__=("chain", "draw")))
    assert float(khat) == pytest.approx(float(posterior.khat), abs=0.02)


def test_what_cannot_be_converted_is_said() -> None:
    point = at(np.arange(3), method="decoding", log_weights=np.full(3, np.nan))
    with pytest.raises(ValueError, match="answers of decoding are points, not draws"):
        point.to_arviz()
    with pytest.raises(ValueError, match="weighted=True needs weights, and draws by mcmc"):
        chains(2, 10).to_arviz(weighted=True)
    with pytest.raises(ValueError, match="num_samples=5: the samples are kept as they are, all 20"):
        chains(2, 10).to_arviz(5)
    with pytest.raises(ValueError, match="num_samples=5: the samples are kept"):
        importance(10).to_arviz(5, weighted=True)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        importance(10).to_arviz(0)


def test_the_converter_imports_no_torch_and_no_pyro() -> None:
    code = (
        "import sys, numpy; from llmppl.posterior.posterior import Posterior; "
        "p = Posterior({'z': numpy.zeros((9, 2), int)}, numpy.zeros(9), numpy.zeros(9), decoders={'z': str}); "
        "p.to_arviz(); repr(p), p._repr_html_(); print([m for m in ('torch', 'pyro', 'jax') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
