"""A guide that writes latent texts in one forward pass, every token independently of the others."""

from __future__ import annotations

import torch
from torch import Tensor

from llmppl.distributions.conditioned_text import ConditionedText
from llmppl.distributions.factorised_text import FactorisedText
from llmppl.guides.masked_guide import NetworkGuide, check_filled
from llmppl.network.scoring import check_length


class DirectGuide(NetworkGuide):
    r"""One forward pass for a whole text: :math:`q(z|x) = \prod_t q_t(z_t|x)`.

    The network reads both sides of a latent text and a canvas of ``max_tokens`` masks between them, and gives
    a law of the token at each place. A stop token ends the text, as in the prior; what the law allows is the
    prior's, so both have one support. Sampling costs one pass for each distinct context, be it for one particle
    or a thousand. Of several latent texts each is told those before it by its prior's context.

    Independent tokens cannot follow one another's lead, and which compromise a training looks for matters: the
    reverse KL of :class:`~llmppl.objectives.LeaveOneOutELBO` and :class:`~llmppl.objectives.TrajectoryBalance`
    settles on texts that hold together, the forward KL of ``WakeSleep(insomnia=0)`` spreads over all marginals
    and proposes mixtures of texts that are none.

    By default a latent text is told its prior's own context and the observed texts before it on the left, and
    the observed texts behind it on the right. ``prompt={"middle": lambda beginning, ending: [beginning, ...,
    ending]}`` replaces it.

    Parameters as in :class:`NetworkGuide`.
    """

    def fill(self, name: str, prior: ConditionedText, left: Tensor, right: Tensor) -> FactorisedText:
        prior = check_filled(name, prior)
        law, network = prior.law, self.network
        if law.grammar is not None:
            raise ValueError(
                f"site {name!r} has a grammar, which makes a token depend on those before it, and this guide's are "
                "independent. Use AutoregressiveGuide, or leave grammar= out and state the condition by pyro.factor."
            )
        if law.max_tokens is None or law.max_tokens > network.max_tokens:
            raise ValueError(
                f"site {name!r} has max_tokens={law.max_tokens}, and the network knows gaps of 1 to "
                f"{network.max_tokens} tokens. Lower it, or make the guide with max_tokens={law.max_tokens}."
            )
        before, width = left.shape[-1], law.max_tokens
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        contexts = torch.cat([side.expand(*shape, -1) for side in (left, right)], -1)
        check_length(contexts, network.max_tokens + 1, self.lm.max_length)

        def logits(rows: Tensor) -> Tensor:
            count = torch.full((len(rows),), width, dtype=torch.long, device=rows.device)
            reading = network.read(rows[:, :before], rows[:, before:])
            canvas = torch.full((len(rows), width), network.mask, dtype=torch.long, device=rows.device)
            states = network.states(reading, canvas, count)
            return network.logits(states.flatten(0, 1)).unflatten(0, (len(rows), width))

        return FactorisedText(self.lm, contexts, law, logits, network.version, prior._validate_args)
