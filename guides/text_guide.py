"""What guides for latent text have in common: they find the text sites and what each is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.guides.copies import independent, reduced
from llmppl.guides.observed_values import ObservedValues, as_tensor
from llmppl.language_model import LM
from llmppl.network.text_tensors import Piece, left_aligned
from llmppl.programs.plates import open_plates
from llmppl.programs.structure import (
    Program,
    Site,
    any_text,
    is_deterministic,
    is_latent,
    is_observation,
    is_text,
    plate_nesting,
    signature,
    structure,
)
from llmppl.text.arguments import check_programs
from llmppl.text.declared import declared
from llmppl.text.prompts import Framework, Telling, check_plates, checked_others, checked_prompts, wrong_batch
from llmppl.text.relations import Relations

Prompt = Callable[..., Sequence[Piece]]
Others = Program | Mapping[str, Callable[..., Any]]
"""A guide for other sites, or by site a function that returns its proposal."""


class TextGuide(nn.Module):
    """A guide that proposes every latent text of a program, site after site in program order.

    It runs the program itself, with its own distribution in place of the prior at each latent text,
    so that later latents see the earlier ones, and plates and control flow are the program's.
    Observed sites, factors, and sites marked for parallel enumeration are not part of it.

    By default a latent text is told the text of the observed sites, then the prior's own context.

    :param model: the program.
    :param lm: the language model.
    :param prompt: for a latent site, a function that returns the pieces it is told instead. Its
        parameters are taken by name: arguments of the program; observed sites of any distribution; latents
        sampled before, text or not, and those of ``others``. Arguments come as they were passed, sites as
        tensors. Return texts as pieces, not inside an f-string: ``lambda beginning, ending: [ending, beginning]``.
        Guides that fill gaps are told both sides, with ``...`` between them: ``[beginning, ..., ending]``.

        Where observations are simulated (the sleep phase, bounds, calibration), what carries one is told as
        simulated, with a row for each particle: the site, and an argument that is the site's ``obs=``, as it is or
        by ``lm.encode``. An argument that an observation is made from otherwise is refused: ask for the site. Which
        it is, runs of the program with other values of the argument show, once for each kind of call.
    :param others: a guide for the program's other latent sites, e.g. an AutoGuide of
        ``poutine.block(model, hide=[...])``. Those sites are sampled first. Or a mapping: by site, a function that
        returns the distribution to propose there, with parameters by name as of ``prompt``. Those sites are sampled
        in program order, and may be told texts before them: ``{"noise": lambda y, formula: LogNormal(...)}``.
    """

    exactness = "marginal"
    """What the guide's log-probability is exact for; see :class:`llmppl.Posterior`."""

    two_sided = False
    """Whether the guide fills a gap (:meth:`fill`), or continues a text (:meth:`distribution`)."""

    transient: tuple[str, ...] = ()
    """Attributes of one run, which no copy has."""

    @declared
    def __init__(
        self,
        model: Program,
        lm: LM,
        prompt: Mapping[str, Prompt] | None = None,
        others: Others | None = None,
    ) -> None:
        super().__init__()
        check_programs(model=model)
        if not isinstance(lm, LM):
            raise TypeError(f"lm must be an llmppl.LM, got {type(lm).__name__}. Use LM(model, tokenizer).")
        # Not registered as submodules: the frozen transformer is none of the guide's parameters.
        self._program = (model, lm)
        self.prompt, self.proposals = checked_prompts(prompt), checked_others(others)
        self.others = others
        self._relations = Relations()

    @property
    def model(self) -> Program:
        return self._program[0]

    @property
    def lm(self) -> LM:
        return self._program[1]

    def distribution(self, name: str, prior: ConditionedText, context: Tensor) -> ConditionedText:
        """The proposal of a site, on ``context`` of shape ``prior.batch_shape + (L,)``."""
        raise NotImplementedError

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> ConditionedText:
        """The proposal of a site between two contexts of shapes ``prior.batch_shape + (L,)``."""
        raise NotImplementedError

    def own_adapters(self) -> tuple[str, ...]:
        """Names of the adapters on the language model that are this guide's."""
        return ()

    def became_a_copy(self, names: Mapping[str, str]) -> None:
        """Called of a copy, with the names of its adapters by those of the original."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """An independent guide on the same language model: a copy trains, and the original stays as it is."""
        return independent(self, memo)

    def __reduce__(self) -> Any:
        return reduced(self)

    def register(self) -> None:
        """Make the guide's parameters known to Pyro's parameter store."""

    def forward(self, *args: Any, observations: Mapping[str, Tensor] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Sample every latent site once.

        :param observations: values that stand in for the program's own observations, by site: simulated
            ones in the sleep phase. Pyro's ``ReweightedWakeSleep`` passes them under this name, too.
        :returns: the sampled values by site.
        :raises ValueError: the program has no latent text, or a latent that the guide does not know.
        """
        self.register()
        given = self._draw_others(args, kwargs)
        return self._propose(_Proposer, given, args, kwargs, observations or {})

    def _draw_others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The sites of ``others``."""
        given: dict[str, Any] = {}
        if callable(self.others):
            with _Recorder(given):
                self.others(*args, **kwargs)
        return given

    def _propose(
        self,
        kind: Callable[..., _Proposer],
        given: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        observations: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """The program with a proposer's distributions at its latent texts; all latent values."""
        proposer = kind(self, given, args, kwargs, observations)
        with proposer:
            self.model(*args, **kwargs)
        return {**given, **proposer.proposed}


def program_name(program: Program) -> str:
    return getattr(program, "__name__", type(program).__name__)


class _Recorder(Messenger):
    """Notes the values of the latent sites that pass."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Site) -> None:
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
        observations: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.guide, self.given, self.proposed = guide, given, dict[str, Tensor]()
        self.observations, self.computed = observations, dict[str, Any]()

        def traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
            with poutine.block(), poutine.condition(data=given):
                return structure(guide.model, args, kwargs)

        def dry(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Site]:
            return dict(traced(args, kwargs).nodes)

        trace = traced(args, kwargs)
        sites, self.nesting = dict(trace.nodes), plate_nesting(trace)
        # What the guide is told is of the rows that plates took in the run that looked for it.
        self.rows = {name: site["value"] for name, site in sites.items() if site_is_subsample(site)}
        observed = _PYRO.observed_sites(sites, given, guide.prompt, guide.proposals)
        told = {name: observations.get(name, site["value"]) for name, site in observed.items()}
        self.observed = {name: (told[name], site) for name, site in observed.items() if is_text(site)}
        self.places = list(sites)
        own = ObservedValues(guide.lm, observed, signature(guide.model), args, kwargs, dry, guide._relations)
        told = {name: as_tensor(value) for name, value in told.items()}
        simulated = {name: value for name, value in told.items() if name in observations}
        self.telling = Telling(own.arguments, told, simulated, own.relation)

    def _pyro_sample(self, msg: Site) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            if name in self.rows:
                msg["value"], msg["done"] = self.rows[name], True
            return
        if not is_latent(msg) or name in self.given:
            if name in self.given:
                msg["value"], msg["done"] = self.given[name], True
            elif is_deterministic(msg):
                self.computed[name] = msg["value"]
            elif name in self.observations:
                # Later latents may be told it by the program.
                msg["value"] = self.observations[name]
            msg["stop"] = True
            return
        if _is_enumerated(msg):
            # The model alone has this site. Later latents are told some value of it.
            if is_text(msg):
                msg["value"], msg["done"] = any_text(msg["fn"]), True
            msg["stop"] = True
            return
        if name in self.guide.proposals:
            msg["fn"] = self.telling.proposal(name, self.guide.proposals[name], self._latents())
            return
        msg["fn"] = self._proposal(name, msg["fn"], msg)
        msg["fn"].site = name

    def _proposal(self, name: str, prior: ConditionedText, msg: Site) -> ConditionedText:
        if self.guide.two_sided:
            return self.guide.fill(name, prior, *self._both_sides(name, prior, msg))
        return self.guide.distribution(name, prior, self._context(name, prior, msg))

    def _pyro_post_sample(self, msg: Site) -> None:
        name = msg["name"]
        if site_is_subsample(msg) and name in self.rows and not torch.equal(msg["value"], self.rows[name]):
            raise ValueError(
                f"plate {name!r} takes other rows than the guide was told of: they are replayed from another run. Give "
                "the program the rows as arguments: fit(..., batch_size=)."
            )
        if is_latent(msg) and name not in self.given and (is_text(msg) or name in self.guide.proposals):
            self.proposed[name] = msg["value"]

    def _latents(self) -> dict[str, Any]:
        """What has been sampled or computed before, by site."""
        return {**self.computed, **self.given, **self.proposed}

    def _context(self, name: str, prior: ConditionedText, msg: Site) -> Tensor:
        if name in self.guide.prompt:
            pieces = self._call_prompt(name)
            if any(piece is ... for piece in pieces):
                raise ValueError(
                    f"prompt[{name!r}] has a gap, and {type(self.guide).__name__} writes from left to right. Leave ... "
                    "out, or use RefinementGuide."
                )
            context = self.guide.lm.context(*pieces)
        else:
            told = [_rows_of(value, site, msg) for value, site in self.observed.values()]
            context = self._before(prior, told)
        return self._expanded(name, prior, context)

    def _both_sides(self, name: str, prior: ConditionedText, msg: Site) -> tuple[Tensor, Tensor]:
        if name in self.guide.prompt:
            left, right = self.guide.lm.both_sides(*self._call_prompt(name))
        else:
            place = self.places.index(name) if name in self.places else len(self.places)
            before, behind = list[Tensor](), list[Tensor]()
            for other, (value, site) in self.observed.items():
                (before if self.places.index(other) < place else behind).append(_rows_of(value, site, msg))
            left = self._before(prior, before)
            own = getattr(prior, "right", left[..., :0])  # what a masked prior is told itself
            right = self.guide.lm.both_sides(left_aligned(left), ..., left_aligned(own), *behind)[1] if behind else own
        return self._expanded(name, prior, left), self._expanded(name, prior, right)

    def _expanded(self, name: str, prior: ConditionedText, context: Tensor) -> Tensor:
        """A context in the batch shape of its site.

        :raises ValueError: it has another, or rows where the site is in no plate.
        """
        try:
            shape = torch.broadcast_shapes(context.shape[:-1], prior.batch_shape)
        except RuntimeError:
            raise wrong_batch(name, tuple(context.shape[:-1]), tuple(prior.batch_shape)) from None
        check_plates(name, tuple(context.shape[:-1]), tuple(prior.batch_shape), self.nesting, open_plates())
        return context.expand(shape + context.shape[-1:])

    def _before(self, prior: ConditionedText, told: list[Tensor]) -> Tensor:
        """Observed texts, then the prior's own context."""
        if not told:
            return prior.context
        lm = self.guide.lm
        # lm.context puts the tokenizer's own beginning in front, so the prior's gives its up.
        return lm.context(*told, left_aligned(prior.context[..., len(lm.codec.start) :]))

    def _call_prompt(self, name: str) -> list[Piece]:
        return self.telling.pieces(name, self.guide.prompt[name], self._latents(), _shown)


def _shown(value: Any) -> str | None:
    """How a value looks inside a string; strings and numbers may stand there."""
    return None if value is None or isinstance(value, (str, int, float)) else str(value)


def _is_enumerated(site: Site) -> bool:
    """Whether the objective sums the site out, so that the guide must not have it."""
    return site["infer"].get("enumerate") == "parallel"


_PYRO = Framework(is_latent, is_text, _is_enumerated, is_observation, "poutine", "pyro.sample")


def _rows_of(value: Tensor, site: Site, latent: Site) -> Tensor:
    """An observed text as a latent site is told it: rows of plates that do not contain the latent
    follow one another in one text."""
    own = {f.dim for f in latent["cond_indep_stack"] if f.vectorized}
    foreign = sorted(f.dim for f in site["cond_indep_stack"] if f.vectorized and f.dim not in own and f.dim is not None)
    for dim in foreign:
        # Counted with the token dimension behind; absent where the value does not vary along it.
        if value.dim() - 1 < -dim or value.shape[dim - 1] == 1:
            continue
        rows = value.movedim(dim - 1, -2)
        merged = rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
        value = left_aligned(merged.unsqueeze(dim - 1))
    # Rows that were merged leave dimensions of size one, which must not widen the latent's batch.
    while value.dim() > 1 and value.shape[0] == 1:
        value = value[0]
    return value
