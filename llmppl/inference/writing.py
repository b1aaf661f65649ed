"""Texts of one site as they are written, a token each at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.network.drawing import Stream, choose, rows_at_once, shared_rows_at_once
from llmppl.network.shared_prompts import pays
from llmppl.network.text_tensors import unpad_rows
from llmppl.text import PAD

CACHES = 4
"""How many times the cache of drawing may be held: all particles stay in memory together."""


class Writing:
    """The texts of all particles at one site, ``N`` in all.

    :param q: what writes them, of batch shape with ``N`` elements.
    :param p: the program's own distribution there.
    :param reads_prior: whether the tokens' log-probabilities under ``p`` are wanted.
    :param retained: texts ``(n, T)`` that the first ``n`` must become.
    :param defensive: share α of the texts that ``p`` writes: each text follows (1 − α) q + α p, whose next token is the
        mixture of both next tokens by what each has made of the text so far.
    """

    def __init__(
        self,
        q: AutoregressiveText,
        p: AutoregressiveText,
        reads_prior: bool,
        retained: Tensor | None = None,
        defensive: float = 0.0,
    ) -> None:
        reads_prior = reads_prior or defensive > 0
        if q.law.max_tokens is None or q.event_shape != p.event_shape:
            raise ValueError(
                f"the guide writes texts of {q.law.max_tokens} tokens, the program {p.law.max_tokens}. Give both the "
                "same max_tokens."
            )
        self.q, self.p, self.retained = q, p, retained
        contexts = unpad_rows(q.context.expand(q.batch_shape + q.context.shape[-1:]).reshape(-1, q.context.shape[-1]))
        count, width = len(contexts), q.law.max_tokens
        device = q.context.device
        self.tokens = torch.full((count, width), PAD, dtype=torch.long, device=device)
        self.log_q = torch.zeros(count, width, dtype=torch.float64, device=device)
        self.open = torch.ones(count, dtype=torch.bool, device=device)
        self.defensive = defensive
        self._odds = torch.zeros(count, dtype=torch.float64, device=device)  # log q - log p of what is written
        self.rows = torch.arange(count, device=device)
        """The texts that are open, in the order of the streams' rows."""
        self.length = 0
        with q.lm.drawing(q.adapter, q.sampling_dtype) as transformer:
            _check_memory(transformer, contexts, width)
            self._stream = Stream(transformer, contexts, width)
        self._prior_stream: Stream | None = None
        same = p.adapter == q.adapter and q.sampling_dtype is None and torch.equal(_flat(p), _flat(q))
        if reads_prior and not same:
            with p.lm.using(p.adapter):
                self._prior_stream = Stream(p.lm.transformer, unpad_rows(_flat(p)), width)
        self.reads_prior = reads_prior
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Log-probabilities of the next token of each open text, ``(open, V)``."""
        begun = self.tokens[self.rows, : self.length]
        self.next_q = self.own_q = self.q.next_log_probs(self._stream.logits, begun, self.rows)
        if not self.reads_prior:
            return
        if self._prior_stream is None and self.p.law is self.q.law and type(self.p) is type(self.q):
            self.next_p = self.next_q
        else:
            self.next_p = self.p.next_log_probs((self._prior_stream or self._stream).logits, begun, self.rows)
        if self.defensive:
            log_odds = self._odds[self.rows] + math.log1p(-self.defensive) - math.log(self.defensive)
            of_q, of_p = (nn.functional.logsigmoid(sign * log_odds)[:, None].to(self.next_q) for sign in (1, -1))
            self.next_q = torch.logaddexp(self.own_q + of_q, self.next_p + of_p)

    def draw(self) -> Tensor:
        """A next token for each open text, from ``q``."""
        token = choose(self.next_q)
        if self.retained is not None:
            mine = self.rows < len(self.retained)
            token[mine] = self.retained[self.rows[mine], self.length]
        return token

    def transitions(self, prior: bool) -> Tensor:
        """Log-probabilities of all continuations of the open texts, ``(open, V)``: those of ``q``, or of ``p`` where
        ``q`` can go."""
        if not prior:
            return self.next_q.double()
        return self.next_p.double().masked_fill(torch.isneginf(self.next_q), -torch.inf)

    def write(self, token: Tensor) -> None:
        """Append a token to each open text."""
        count = len(self.tokens)
        self._log_q = torch.zeros(count, dtype=torch.float64)
        self._log_p = torch.zeros(count, dtype=torch.float64)
        at = self.rows.cpu()
        self._log_q[at] = self.next_q.gather(-1, token[:, None])[:, 0].double().cpu()
        if self.reads_prior:
            self._log_p[at] = self.next_p.gather(-1, token[:, None])[:, 0].double().cpu()
        if self.defensive:
            own = self.own_q.gather(-1, token[:, None])[:, 0].double()
            # A text that neither writes has no odds, and is not drawn.
            self._odds[self.rows] += own - self._log_p[at].to(own.device)
        ends = self.q.law.ends(self.tokens[self.rows, : self.length], token)
        self.tokens[self.rows, self.length] = token
        self.log_q[self.rows, self.length] = self._log_q[at].to(self.log_q.device)
        self.length += 1
        self._last = token
        self.open[self.rows] = ~ends & (self.length < self.tokens.shape[1])

    def steps(self) -> tuple[Tensor, Tensor]:
        """What the last token of each text added to its log q and log p, ``(N,)`` each, zero where none was written."""
        return self._log_q, self._log_p

    def advance(self) -> None:
        """Read the last token of the texts that are still open."""
        kept = self.open[self.rows].nonzero()[:, 0]
        if not len(kept):
            self.rows = self.rows[kept]
            return
        self._select(kept)
        last = self._last[kept]
        with self.q.lm.drawing(self.q.adapter, self.q.sampling_dtype):
            self._stream.advance(last)
        if self._prior_stream is not None:
            with self.p.lm.using(self.p.adapter):
                self._prior_stream.advance(last)
        self._look_ahead()

    def _select(self, places: Tensor) -> None:
        """Go on with these rows of the streams."""
        if len(places) == len(self.rows) and bool((places == torch.arange(len(places), device=places.device)).all()):
            return
        for stream in (self._stream, self._prior_stream):
            if stream is not None:
                stream.select(places)
        self.rows = self.rows[places]
        self.next_q, self.own_q = self.next_q[places], self.own_q[places]
        if self.reads_prior:
            self.next_p = self.next_p[places]

    def drop(self, dead: Tensor) -> None:
        """Write no further at texts whose particles have weight zero, ``(N,)``."""
        dead = dead.to(self.open.device)
        self.open &= ~dead
        self._select(self.open[self.rows].nonzero()[:, 0])

    def reorder(self, source: Tensor) -> None:
        """Text ``n`` becomes a copy of text ``source[n]``."""
        source = source.to(self.tokens.device)
        place = torch.full((len(self.tokens),), -1, device=source.device)
        place[self.rows] = torch.arange(len(self.rows), device=source.device)
        self.tokens, self.log_q, self.open = self.tokens[source], self.log_q[source], self.open[source]
        self._odds = self._odds[source]
        rows = self.open.nonzero()[:, 0]
        self._select(place[source[rows]])
        self.rows = rows

    def can_end(self) -> bool:
        """Whether an open text may end with its next token."""
        return not bool(self.q.law.stop_forbidden(torch.tensor(self.length)))

    def ended(self) -> tuple[Tensor, Tensor]:
        """Every text, open ones closed by the law's first stop token that may occur, ``(N, T)``; and the
        log-probability under ``q`` of closing them, ``(N,)``, zero where they have ended."""
        stop = self.q.law.closer
        texts, log_stop = self.tokens.clone(), torch.zeros(len(self.tokens), dtype=torch.float64)
        texts[self.rows, self.length] = stop
        log_stop[self.rows.cpu()] = self.own_q[:, stop].double().cpu()
        return texts, log_stop


def _flat(fn: AutoregressiveText) -> Tensor:
    return fn.context.expand(fn.batch_shape + fn.context.shape[-1:]).reshape(-1, fn.context.shape[-1])


def _check_memory(transformer: torch.nn.Module, contexts: list[list[int]], width: int) -> None:
    """Refuse more texts than the cache may hold.

    :raises ValueError: with the number that fits.
    """
    count, longest = len(contexts), max(map(len, contexts))
    tokens = longest + width
    most = CACHES * rows_at_once(transformer, tokens)
    rows = [tuple(context) for context in contexts]
    if len(set(rows)) == 1 and pays(rows, width):  # as the stream of the drawing decides
        most = max(most, CACHES * shared_rows_at_once(transformer, longest, width))
    if count > most:
        raise ValueError(
            f"{count} texts of up to {tokens} tokens at once do not fit the cache, which holds {most}. Lower "
            "num_samples and raise num_runs, or pass fewer observations at a time."
        )
