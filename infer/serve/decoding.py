"""The decoding of one answer: the choice of its next token, and the text that the token adds."""

from __future__ import annotations

import torch

from infer.answerer import FeatureAnswerer
from infer.serve.request import Finish, GenerationRequest, TextDelta, TokenLogprob
from llava_core.language.detokenize import StreamDetokenizer
from llava_core.language.generate import choose
from llava_core.language.json_grammar import START, advance
from llava_core.language.token_text import TokenTexts


class Answer:
    """A request that is being answered."""

    def __init__(self, request: GenerationRequest, aligned: FeatureAnswerer, texts: TokenTexts) -> None:
        """`request.prefill` must be the beginning of a JSON object if the answer is to be one."""
        self.request, self._texts, self._llm = request, texts, aligned.llm
        begun = request.ids[len(request.ids) - request.prefilled :]
        self._detokenizer = StreamDetokenizer(aligned.text, request.sampling.stop, begun)
        self._generator = torch.Generator(aligned.llm.device).manual_seed(request.sampling.seed)
        self._state = advance(START, request.prefill)
        """State of the JSON grammar."""
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is held back."""

    @property
    def last(self) -> int:
        """The token before the next one."""
        return self._detokenizer.tokens[-1]

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """The next token by logits [V], whose argmax is `likeliest`; NOT_FINITE if there is none."""
        request, sampling = self.request, self.request.sampling
        if not request.json and not sampling.temperature and sampling.repetition_penalty == 1:
            return likeliest
        if request.json:
            assert self._state is not None
            allowed = request.json.allowed(self._state).to(logits.device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        before = torch.tensor([self._detokenizer.tokens], dtype=torch.long, device=logits.device)
        return int(choose(logits[None], sampling, [self._generator], before))

    def note(self, token: int, logits: torch.Tensor) -> None:
        """Keep the log probabilities that the request asks for."""
        top = self.request.top_logprobs
        if top is None or token in self._llm.eos_ids:
            return
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(min(top, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        others = tuple(TokenLogprob(*self._texts.with_bytes(other), value) for other, value in pairs)
        own = TokenLogprob(*self._texts.with_bytes(token), float(logprobs[token]), others)
        self._logprobs.append(own)

    def add(self, token: int, context: int) -> TextDelta:
        """What the next token adds to the answer, in a context of so many tokens."""
        request, detokenizer = self.request, self._detokenizer
        if token in self._llm.eos_ids:
            return self._delta(detokenizer.end(), "stop")
        text = detokenizer.add(token)
        request.tokens += 1
        if request.json:
            assert self._state is not None
            self._state = advance(self._state, request.json.texts[token])
        if detokenizer.stopped:
            return self._delta(text, "stop")
        if request.json and not self._state:
            return self._delta(text + detokenizer.end(), "stop")
        if request.tokens == request.sampling.limit(context - request.prompt_tokens):
            return self._delta(text + detokenizer.end(), "length")
        return self._delta(text) if text else TextDelta("")

    def _delta(self, text: str, finish: Finish | None = None) -> TextDelta:
        logprobs, self._logprobs = tuple(self._logprobs), []
        return TextDelta(text, finish, logprobs=logprobs)
