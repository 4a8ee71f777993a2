"""infer.lens.readout where the right words are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from infer.answerer import FeatureAnswerer
from infer.lens.readout import Vocabulary, embedding_similarity, logit_lens, piece_losses, random_projector
from llava_core.errors import LlavaError
from llava_core.language.load import load_language_model
from llava_core.language.prompt_and_labels import Turn
from llava_core.projector.projector import build_projector
from tests.support.language_models import write_language_model


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> FeatureAnswerer:
    folder: Path = write_language_model(tmp_path_factory.mktemp("llm"))
    torch.manual_seed(0)
    return FeatureAnswerer(build_projector("mlp", 6, 32).requires_grad_(False), load_language_model(folder))


def test_a_token_that_is_a_word_is_nearest_to_it(answerer: FeatureAnswerer) -> None:
    vocabulary = Vocabulary(answerer)
    assert {"a", "Z", "?"} < set(vocabulary.words)
    # Special tokens, blanks and half characters are not among the words: 94 bytes are left.
    assert sorted(vocabulary.words) == [chr(code) for code in range(33, 127)]
    ids = [answerer.conversation.tokenizer.convert_tokens_to_ids(letter) for letter in "aZ?"]
    scores = embedding_similarity(answerer.llm, 3 * answerer.embed(ids)[0])
    tops = vocabulary.top(scores, 4)
    assert [words[0][0] for words in tops] == ["a", "Z", "?"]
    assert [words[0][1] for words in tops] == pytest.approx([1, 1, 1])
    assert all(len(words) == 4 and words[1][1] < 1 for words in tops)


def test_after_the_last_block_the_lens_is_the_model(answerer: FeatureAnswerer) -> None:
    visual = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = answerer.llm.model(inputs_embeds=visual[None]).logits[0]
        first = answerer.llm.model(inputs_embeds=visual[None], output_hidden_states=True).hidden_states[1][0]
        early = F.linear(answerer.llm.model.model.norm(first), answerer.llm.head)
    torch.testing.assert_close(logit_lens(answerer.llm, visual, 2), logits.softmax(-1))
    torch.testing.assert_close(logit_lens(answerer.llm, visual, 1), early.softmax(-1))
    assert not torch.allclose(early, logits, atol=0.1)
    for layer in (0, 3):
        with pytest.raises(LlavaError, match="--layer; expected 1 to 2"):
            logit_lens(answerer.llm, visual, layer)


def test_the_losses_of_the_pieces_are_those_of_the_caption(answerer: FeatureAnswerer) -> None:
    visual = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    turn = Turn("看", "红 a。")
    pieces, loss = piece_losses(answerer, visual, [turn])
    assert pieces == ["红", " ", "a", "。", ""]  # 3, 1, 1 and 3 bytes, and the end token
    example = answerer.conversation.example([turn], 100)
    embedded = torch.cat([visual[None], answerer.embed(example.ids)], dim=1)
    labels = torch.tensor([[-100] * 4 + example.labels])
    mean = answerer.llm.model(inputs_embeds=embedded, labels=labels).loss
    assert sum(loss) / 9 == pytest.approx(float(mean), rel=1e-5)
    assert piece_losses(answerer, visual.flip(0), [turn])[1] != loss


def test_the_random_projector_has_learnt_nothing_and_is_as_loud(answerer: FeatureAnswerer) -> None:
    features = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(3))
    state = torch.random.get_rng_state()
    control = random_projector(answerer.projector, features, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, theirs = answerer.projector(features), control(features)
    assert ours.shape == theirs.shape
    assert float(theirs.pow(2).mean()) == pytest.approx(float(ours.pow(2).mean()), rel=1e-4)
    assert abs(float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))) < 0.5
    assert torch.equal(random_projector(answerer.projector, features, seed=0)(features), theirs)
