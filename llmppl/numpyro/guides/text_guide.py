"""What guides for latent text have in common: they find the text sites and what each is told."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpyro
from jax import Array
from numpyro import handlers
from numpyro.primitives import Messenger

from llmppl.numpyro.distributions.autoregressive_text import AutoregressiveText
from llmppl.numpyro.distributions.choice import Choice
from llmppl.numpyro.guides.observed_arrays import ObservedArrays, as_array
from llmppl.numpyro.language_model import LM
from llmppl.numpyro.network.text_arrays import Piece, TextArgument, is_concrete
from llmppl.numpyro.programs.tracing import (
    Program,
    Site,
    Trace,
    Values,
    is_latent,
    is_observation,
    is_text,
    open_plates,
    plate_nesting,
    signature,
    structure,
    subsampled,
)
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared
from llmppl.text.prompts import Framework, Telling, check_plates, checked_others, checked_prompts, wrong_batch
from llmppl.text.relations import Relations

Prompt = Callable[..., Sequence[Piece]]
Others = Program | Mapping[str, Callable[..., Any]]
"""A guide for other sites, or by site a function that returns its proposal."""
Context = tuple[Array, ...]
Text = AutoregressiveText | Choice


class TextGuide:
    """A guide that proposes every latent text of a program, site after site in program order.

    It runs the program itself, with its own distribution in place of the prior at each latent text, so that later
    latents see the earlier ones, and plates and control flow are the program's. Observed sites, factors, and sites
    marked for parallel enumeration are not part of it.

    By default a latent text is told the text of the observed sites, then the prior's own context.

    :param model: the program.
    :param lm: the language model.
    :param prompt: for a latent site, a function that returns the pieces it is told instead. Its parameters are taken by
        name: arguments of the program; observed sites of any distribution; latents sampled before, text or not, and
        those of ``others``. Arguments come as the program gets them, sites as arrays. Return texts as pieces, not
        inside an f-string: ``lambda beginning, ending: [ending, beginning]``.

        Where observations are simulated (the sleep phase, bounds), what carries one is told as simulated: the site, and
        an argument that is the site's ``obs=``, as it is or by ``lm.encode``. An argument that an observation is made
        from otherwise is refused: ask for the site. Which it is, the program's jaxpr shows, or runs with other values
        of an argument that is not compiled, once for each kind of call.
    :param others: a guide for the program's other latent sites, e.g. an AutoGuide of ``handlers.block(model,
        hide=[...])``. Those sites are sampled first. Or a mapping: by site, a function that returns the distribution
        to propose there, with parameters by name as of ``prompt``. Those sites are sampled in program order, and may
        be told texts before them: ``{"noise": lambda y, formula: LogNormal(...)}``.
    """

    exactness = "marginal"
    """What the guide's log-probability is exact for; see :class:`llmppl.Posterior`."""

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
    ) -> None:
        check_programs(model=model)
        if not isinstance(lm, LM):
            raise TypeError(
                f"lm must be an llmppl.numpyro.LM, got {type(lm).__name__}. Use llmppl.numpyro.LM.from_pretrained()."
            )
        self.model, self.lm, self.prompt, self.others = model, lm, checked_prompts(prompt), others
        self.proposals = checked_others(others)
        self._relations = Relations()
        self.params: dict[str, Any] = {}
        """Trained values of parameters that are not the guide's own, those of ``others`` say, by their name."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """An independent guide on the same language model: a copy trains, and the original stays as it is."""
        for part in (self.lm, self.model):
            memo.setdefault(id(part), part)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return twin

    def distribution(self, name: str, prior: Text, context: Context) -> Text:
        """The proposal of a site, on a context as :meth:`LM.context` gives it."""
        raise NotImplementedError

    def register(self) -> TextGuide:
        """The guide with parameters as ``numpyro.param`` gives them: itself where it has none."""
        return self

    def update(self, params: Mapping[str, Any]) -> None:
        """Take over trained parameters, e.g. ``svi_result.params``: those of ``others`` too.

        :param params: by name, as ``SVI`` and :func:`~llmppl.numpyro.fit` have them.
        """
        self.params = {**self.params, **params}

    def __call__(self, *args: Any, observations: Values | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sample every latent site once.

        :param observations: values that stand in for the program's own observations, by site: simulated ones in the
            sleep phase.
        :returns: the sampled values by site.
        :raises ValueError: the program has no latent text, or a latent that the guide does not know.
        """
        registered = self.register()
        given: dict[str, Any] = {}
        if callable(self.others):
            with _Recorder(given), handlers.substitute(data=self.params):
                self.others(*args, **kwargs)
        proposer = _Proposer(registered, given, args, kwargs, observations or {})
        with proposer:
            self.model(*args, **kwargs)
        return {**given, **proposer.proposed}

    def __repr__(self) -> str:
        prompts = f", prompt for {sorted(self.prompt)}" if self.prompt else ""
        return f"{type(self).__name__}({program_name(self.model)}, {self.lm!r}{prompts})"


def program_name(program: Program) -> str:
    return getattr(program, "__name__", type(program).__name__)


class _Recorder(Messenger):
    """Notes the values of the latent sites that pass."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def postprocess_message(self, msg: Site) -> None:
        if is_latent(msg):
            self.values[msg["name"]] = msg["value"]


class _Proposer(Messenger):
    """Puts a guide's proposals in place of the priors of latent texts, and hides the rest."""

    def __init__(
        self,
        guide: TextGuide,
        given: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Values,
    ) -> None:
        super().__init__()
        self.guide, self.given, self.observations = guide, given, observations
        self.proposed, self.computed = dict[str, Array](), dict[str, Any]()
        self.rows: Values = {}

        def dry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
            return structure(handlers.substitute(guide.model, data={**given, **self.rows}), args, kwargs)

        sites = dry(args, kwargs)
        some = {name: sites[name]["args"] for name in subsampled(sites)}
        if some:  # what is told is of the rows that the program is to have
            for name, sizes in some.items():
                with numpyro.plate(name, *sizes) as self.rows[name]:
                    pass
            sites = dry(args, kwargs)
        self.nesting = plate_nesting(sites)
        observed = _NUMPYRO.observed_sites(sites, given, guide.prompt, guide.proposals)
        told = {name: observations.get(name, site["value"]) for name, site in observed.items()}
        self.observed = {name: (told[name], site) for name, site in observed.items() if is_text(site)}
        own = ObservedArrays(guide.lm, observed, signature(guide.model), args, kwargs, dry, guide._relations)
        told = {name: as_array(value) for name, value in told.items()}
        simulated = {name: value for name, value in told.items() if name in observations}
        self.telling = Telling(own.arguments, told, simulated, own.relation)

    def process_message(self, msg: Site) -> None:
        if msg["type"] in ("param", "mutable", "deterministic"):
            # The program's own; a deterministic site may depend on what the guide does not know.
            msg["stop"] = msg["type"] == "deterministic"
            if msg["stop"]:
                self.computed[msg["name"]] = msg["value"]
            return
        if msg["type"] == "plate" and msg["name"] in self.rows:
            msg["value"] = self.rows[msg["name"]]
        if msg["type"] != "sample":
            return
        name = msg["name"]
        if not is_latent(msg) or name in self.given:
            if name in self.given:
                msg["value"] = self.given[name]
            elif name in self.observations:
                # Later latents may be told it by the program.
                msg["value"] = self.observations[name]
            msg["stop"] = True
        elif _is_enumerated(msg):
            raise ValueError(
                f"site {name!r} is marked for parallel enumeration, which guides of texts do not have in NumPyro. "
                "Sum it out by hand with enumerate_support(), or give it as an option to exact_posterior."
            )
        elif name in self.guide.proposals:
            proposal = self.telling.proposal(name, self.guide.proposals[name], self._latents())
            # The program's plates have widened the prior already, and nobody would the proposal.
            msg["fn"] = proposal.expand(jnp.broadcast_shapes(proposal.batch_shape, msg["fn"].batch_shape))
        else:
            msg["fn"] = self.guide.distribution(name, msg["fn"], self._context(name, msg["fn"], msg))

    def postprocess_message(self, msg: Site) -> None:
        if not is_latent(msg):  # a key, say, has no name
            return
        name = msg["name"]
        if name not in self.given and (is_text(msg) or name in self.guide.proposals):
            self.proposed[name] = msg["value"]

    def _latents(self) -> dict[str, Any]:
        """What has been sampled or computed before, by site."""
        return {**self.computed, **self.given, **self.proposed}

    def _context(self, name: str, prior: Text, msg: Site) -> Context:
        if name not in self.guide.prompt:
            told = [_rows_of(value, site, msg) for value, site in self.observed.values()]
            return _before(self.guide.lm, prior, told)
        context = self.guide.lm.context(*self._call_prompt(name))
        shape = jnp.broadcast_shapes(*(text.shape[:-1] for text in context))
        try:
            jnp.broadcast_shapes(shape, prior.batch_shape)
        except ValueError:
            raise wrong_batch(name, tuple(shape), tuple(prior.batch_shape)) from None
        check_plates(name, tuple(shape), tuple(prior.batch_shape), self.nesting, open_plates())
        return context

    def _call_prompt(self, name: str) -> list[Piece]:
        return self.telling.pieces(name, self.guide.prompt[name], self._latents(), _shown)


def _shown(value: Any) -> str | None:
    """How a value looks inside a string; of strings and numbers, which may stand there, and of what is being compiled,
    nothing."""
    known = value is not None and not isinstance(value, (str, int, float, TextArgument)) and is_concrete(value)
    return str(value) if known else None


def _before(lm: LM, prior: Text, told: list[Any]) -> Context:
    """Observed texts, then the prior's own context."""
    if not told:
        return prior.context
    start = len(lm.codec.start)
    if not start:
        return (*told, *prior.context)
    # What the tokenizer puts before every text stands in front, so the prior's gives its up.
    first, *rest = prior.context
    return (*lm.context(*told), *((first[..., start:],) if first.shape[-1] > start else ()), *rest)


def _is_enumerated(site: Site) -> bool:
    return bool(site["infer"].get("enumerate") == "parallel")


_NUMPYRO = Framework(is_latent, is_text, _is_enumerated, is_observation, "handlers", "numpyro.sample")


def _rows_of(value: Any, site: Site, latent: Site) -> Any:
    """An observed text as a latent site is told it: rows of plates that do not contain the latent follow one another
    in one text; padding between them is skipped when they are read."""
    own = {frame.dim for frame in latent["cond_indep_stack"]}
    for dim in sorted(frame.dim for frame in site["cond_indep_stack"] if frame.dim not in own):
        # Counted with the token dimension behind; absent where the value does not vary along it.
        if value.ndim - 1 < -dim or value.shape[dim - 1] == 1:
            continue
        rows = jnp.moveaxis(value, dim - 1, -2)
        merged = rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
        value = jnp.expand_dims(merged, dim - 1)
    # Rows that were merged leave dimensions of size one, which must not widen the latent's batch.
    while value.ndim - 1 > len(latent["fn"].batch_shape) and value.shape[0] == 1:
        value = value[0]
    return value
