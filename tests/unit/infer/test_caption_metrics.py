"""infer.score.caption_metrics against COCO's own code, and infer.score.word_split spelt out."""

from __future__ import annotations

import random

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from infer.score.caption_metrics import bleu, cider_d, longest_common, rouge_l
from infer.score.word_split import characters, is_chinese, open_tokenizer, spaces
from llava_align.demo.world.captions import caption
from llava_align.demo.world.scene import random_scene
from llava_core.errors import LlavaError


def captions(rng: random.Random, references: int) -> tuple[list[str], list[list[str]]]:
    """The demo's captions of 40 scenes, and answers about them: whole, cut, stuttered, invented or empty."""
    answers, known = [], []
    for k in range(40):
        scene = random_scene(rng)
        known.append([" ".join(characters(caption(scene, rng))) for _ in range(references)])
        words = characters(caption(scene if k % 3 else random_scene(rng), rng))
        kinds: tuple[list[str], ...] = (words, words[: rng.randint(1, 9)], words + words[:12], ["新"] * 5, [])
        answers.append(" ".join(kinds[k % len(kinds)]))
    return answers, known


@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_are_those_of_pycocoevalcap(references: int, seed: int) -> None:
    answers, known = captions(random.Random(seed), references)
    said = {k: [answer] for k, answer in enumerate(answers)}
    wanted = dict(enumerate(known))
    words, reference_words = [a.split() for a in answers], [[r.split() for r in rs] for rs in known]
    theirs, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    assert bleu(words, reference_words) == pytest.approx(theirs, rel=1e-6)
    assert 0.1 < theirs[3] < 0.9
    assert rouge_l(words, reference_words) == pytest.approx(Rouge().compute_score(wanted, said)[0], rel=1e-12)
    cider, _ = Cider().compute_score(wanted, said)
    assert cider_d(words, reference_words) == pytest.approx(cider, rel=1e-9)
    assert cider > 0.5


def test_the_ends_of_the_scales() -> None:
    texts = [list("红色的圆形在左"), list("蓝色的方块在右"), list("绿色五角星")]
    known = [[text] for text in texts]
    assert bleu(texts, known) == pytest.approx([1, 1, 1, 1])
    assert (rouge_l(texts, known), cider_d(texts, known)) == pytest.approx((1, 10))
    nothing: list[list[str]] = [[], [], []]
    assert (bleu(nothing, known), rouge_l(nothing, known), cider_d(nothing, known)) == ([0] * 4, 0, 0)
    assert longest_common("abcbdab", "bdcaba") == 4


def test_words() -> None:
    assert characters("图中有2个ＲＥＤ圆形，iPhone-15！") == [
        "图",
        "中",
        "有",
        "2",
        "个",
        "red",
        "圆",
        "形",
        "iphone",
        "15",
    ]
    assert spaces("A  dog's “bone”, half-eaten ... 。") == ["a", "dog's", "bone", "half-eaten"]
    split, record = open_tokenizer("jieba", [])
    assert split("左上角有一个大的红色圆形。") == ["左上角", "有", "一个", "大", "的", "红色", "圆形"]
    assert record == {"name": "jieba", "version": "0.42.1"}


def test_the_script_decides_and_is_never_mixed() -> None:
    assert open_tokenizer("auto", ["红色 circle 的", "蓝"])[1] == {"name": "char", "version": "1"}
    assert open_tokenizer("auto", ["a red circle", "two"])[1] == {"name": "space", "version": "1"}
    assert not is_chinese("the word 红")
    with pytest.raises(LlavaError, match="some references are Chinese and some are not; got '红' and 'red'"):
        open_tokenizer("auto", ["红", "red"])
    assert open_tokenizer("space", ["红", "red"])[0]("红 red") == ["红", "red"]
