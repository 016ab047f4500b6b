"""The mechanics of a language model as judge: what it is shown, what it is asked, and what its answers are worth."""

import zlib

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_hierarchical_sae import (
    HierarchicalSaeConfig,
    HierarchicalSaeModel,
    LatentActivations,
    detection_scores,
    explain_latents,
    fuzzing_scores,
    judge_scores,
    read_latents,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def judge(tiny_language_model):
    return AutoModelForCausalLM.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def activations(judge, tokenizer):
    torch.manual_seed(0)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=4, layer=0)).eval()
    texts = [f"the {number} slings and arrows of outrageous fortune {number}" for number in range(120)]
    return read_latents(sae, judge, tokenizer, texts, show_progress=False)


class Oracle(torch.nn.Module):
    """A judge that says yes where the prompt holds a word, and remembers what it was asked."""

    def __init__(self, judge, tokenizer, word):
        super().__init__()
        self.judge, self.tokenizer, self.word, self.prompts = judge, tokenizer, word, []
        self.device = judge.device

    def forward(self, input_ids, logits_to_keep):
        text = self.tokenizer.decode(input_ids[0])
        self.prompts.append(text)
        output = self.judge(input_ids=input_ids, logits_to_keep=logits_to_keep)
        asked = text.partition("Text: ")[2].partition("\n\n")[0]
        sign = 1 if self.word in asked else -1
        ids = self.tokenizer("YN")["input_ids"][-2:]
        output.logits[..., ids[0]] += 50 * sign
        output.logits[..., ids[1]] -= 50 * sign
        return output


@pytest.fixture(scope="module")
def planted(activations, tokenizer):
    """Latent 0 fires on the digit 7 and nothing else, the others never."""
    seven = tokenizer("7")["input_ids"][-1]
    positions = (activations.token_ids == seven).nonzero().flatten()
    of_latent = {
        "latent_starts": torch.tensor([0] + [len(positions)] * 64),
        "positions": positions.int(),
        "values": torch.linspace(1, 2, len(positions)),
        "ranks": torch.ones(len(positions), dtype=torch.int16),
    }
    return LatentActivations(**{**vars(activations), **of_latent})


def test_a_judge_that_knows_where_a_latent_fires_scores_one(planted, tokenizer, judge):
    knows, knows_marks = Oracle(judge, tokenizer, "7"), Oracle(judge, tokenizer, "<<7>>")
    given = {"window": 12, "show_progress": False}

    detection = detection_scores(planted, tokenizer, {0: "the digit 7"}, knows, judge_tokenizer=tokenizer, **given)
    fuzzing = fuzzing_scores(planted, tokenizer, {0: "the digit 7"}, knows_marks, judge_tokenizer=tokenizer, **given)

    assert detection[0].auroc == detection[0].balanced_accuracy == 1 and detection[0].examples > 1
    assert fuzzing[0].auroc == fuzzing[0].balanced_accuracy == 1 and fuzzing[0].examples > 1
    assert all(
        "Description: the digit 7\n" in prompt and "<|im_start|>assistant" in prompt for prompt in knows.prompts
    )
    assert all(prompt.count("<<") == 2 for prompt in knows_marks.prompts if "<<7>>" not in prompt)
    ignorant = detection_scores(
        planted, tokenizer, {0: "a"}, Oracle(judge, tokenizer, "@"), judge_tokenizer=tokenizer, **given
    )
    assert ignorant[0].balanced_accuracy == 0.5


def test_explanations_of_latents_in_a_tensor_are_found_by_number(planted, tokenizer, judge):
    explanations = explain_latents(
        planted,
        tokenizer,
        planted.live_latents,
        judge,
        judge_tokenizer=tokenizer,
        max_new_tokens=1,
        show_progress=False,
    )

    assert planted.live_latents.tolist() == [0] and isinstance(explanations[0], str)


def test_an_explanation_is_the_greedy_answer_whatever_the_judge_is_set_to(planted, tokenizer, judge, monkeypatch):
    def explained():
        options = {"judge_tokenizer": tokenizer, "show_progress": False}
        return explain_latents(planted, tokenizer, [0], judge, **options)

    greedy = explained()
    for setting, value in (("num_beams", 4), ("repetition_penalty", 1.9), ("no_repeat_ngram_size", 1)):
        monkeypatch.setattr(judge.generation_config, setting, value)
        assert explained() == greedy


def test_what_explains_is_not_what_is_scored(planted, tokenizer, judge, monkeypatch):
    asked = []
    monkeypatch.setattr(
        type(judge),
        "generate",
        lambda self, **given: (
            asked.append(tokenizer.decode(given["input_ids"][0]))
            or torch.cat([given["input_ids"], torch.tensor([tokenizer(" words\nmore")["input_ids"]])], dim=1)
        ),
    )
    oracle, given = Oracle(judge, tokenizer, "7"), {"window": 12, "show_progress": False}
    explanations = explain_latents(planted, tokenizer, [0], judge, judge_tokenizer=tokenizer, **given)
    detection_scores(planted, tokenizer, explanations, oracle, judge_tokenizer=tokenizer, **given)

    assert explanations[0].strip() == "words"
    shown = {line.partition(". ")[2] for line in asked[0].splitlines() if line[:1].isdigit()}
    texts = {prompt.partition("Text: ")[2].partition("\n\n")[0] for prompt in oracle.prompts}
    firing = {text for text in texts if "7" in text}
    assert len(shown) == 8 and all("<<7" in text for text in shown)
    assert len(firing) > 3 and len(texts) > len(firing)
    assert not firing & {text.replace("<<", "").replace(">>", "") for text in shown}


def test_a_judge_without_a_chat_template_is_asked_as_a_text_begins(planted, tokenizer, judge, tiny_language_model):
    plain = AutoTokenizer.from_pretrained(tiny_language_model)
    plain.chat_template = None
    # As the tokenizers of Llama and Gemma do, and some do at the end.
    plain.bos_token, plain.eos_token = "<|im_start|>", "<|im_end|>"
    bos, eos = plain.bos_token_id, plain.eos_token_id
    ends = [("<|im_start|>", bos), ("<|im_end|>", eos)]
    plain.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A <|im_end|>", special_tokens=ends)
    oracle, asked = Oracle(judge, tokenizer, "7"), []
    hook = judge.register_forward_pre_hook(lambda _, args, given: asked.append(given["input_ids"]), with_kwargs=True)
    options = {"judge_tokenizer": plain, "window": 12, "examples": 3, "show_progress": False}

    explanations = explain_latents(planted, tokenizer, [0], judge, **options, max_new_tokens=1)
    found = detection_scores(planted, tokenizer, explanations, oracle, **options)
    hook.remove()

    assert found[0].auroc == found[0].balanced_accuracy == 1
    assert all(ids[0, 0] == bos and eos not in ids for ids in asked) and len(asked) == 7
    # " Yes" and " No" begin with the same token here, the space; asked for is what follows it.
    assert all(prompt.endswith("Answer: ") for prompt in oracle.prompts)
    assert tokenizer.decode(asked[0][0]).endswith("Answer with one short phrase.\n\nAnswer:")


def test_a_judge_whose_tokenizer_does_not_know_the_answers_is_refused(planted, tokenizer, judge):
    words = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    blind = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

    with pytest.raises(ValueError, match="'Yes' and 'No' the same tokens: give another judge"):
        detection_scores(planted, tokenizer, {0: "a"}, judge, judge_tokenizer=blind, show_progress=False)


def test_a_latent_that_does_not_fire_at_the_budget_is_left_out(activations, tokenizer, judge):
    never_first = next(
        latent for latent in activations.live_latents.tolist() if activations.latent(latent)[2].min() > 1
    )

    assert (
        explain_latents(
            activations, tokenizer, [never_first], judge, judge_tokenizer=tokenizer, k=1, show_progress=False
        )
        == {}
    )
    assert (
        detection_scores(
            activations, tokenizer, {never_first: "x"}, judge, judge_tokenizer=tokenizer, k=1, show_progress=False
        )
        == {}
    )
    assert (
        fuzzing_scores(
            activations, tokenizer, {never_first: "x"}, judge, judge_tokenizer=tokenizer, k=1, show_progress=False
        )
        == {}
    )


def test_a_judge_that_cannot_read_the_prompt_is_refused(activations, tokenizer):
    config = {"n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    short, small = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **config, **sizes)).eval()
        for sizes in ({"vocab_size": 300, "n_positions": 16}, {"vocab_size": 50, "n_positions": 2000})
    )
    latent = int(activations.live_latents[0])
    for judge, message in (
        (short, "the judge has too few positions for a prompt of"),
        (small, "has a vocabulary of 50"),
    ):
        options = {"judge_tokenizer": tokenizer, "show_progress": False}
        with pytest.raises(ValueError, match=message):
            explain_latents(activations, tokenizer, [latent], judge, **options)
        with pytest.raises(ValueError, match=message):
            detection_scores(activations, tokenizer, {latent: "a word"}, judge, **options)


@pytest.mark.parametrize(
    "latents, options, message",
    [
        ([64], {}, r"latent must be in \[0, d_sae=64\), got 64"),
        ([True], {}, "latent must be an integer, got True"),
        ([1], {"k": 2.5}, "budgets must be integers, got"),
        ([1], {"examples": 0}, "examples must be at least 1, got 0"),
        ([1], {"window": 7.5}, "window must be an integer, got 7.5"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(activations, tokenizer, judge, latents, options, message):
    options = {"judge_tokenizer": tokenizer, "show_progress": False, **options}
    with pytest.raises(ValueError, match=message):
        explain_latents(activations, tokenizer, latents, judge, **options)
    with pytest.raises(ValueError, match=message):
        fuzzing_scores(activations, tokenizer, dict.fromkeys(latents, "a word"), judge, **options)


def hand_made(lengths, firing, unread=()):
    """Contexts of some lengths in tokens 0, 1, 2, …; `firing` holds (latent, position, value) in order."""
    total = sum(lengths)
    latents = torch.tensor([latent for latent, _, _ in firing])
    is_read = torch.ones(total, dtype=torch.bool)
    is_read[list(unread)] = False
    return LatentActivations(
        k=1,
        token_ids=torch.arange(total),
        context_starts=torch.tensor([0, *lengths]).cumsum(0),
        is_read=is_read,
        latent_starts=torch.tensor([0, *torch.bincount(latents, minlength=3).cumsum(0)]),
        positions=torch.tensor([position for _, position, _ in firing]).int(),
        values=torch.tensor([value for _, _, value in firing]),
        ranks=torch.ones(len(firing), dtype=torch.int16),
    )


@pytest.fixture
def judged(monkeypatch):
    """Scores of a hand-made set, and the texts that were asked about as lists of tokens, "<" and ">"."""
    monkeypatch.setattr(judge_scores, "decoded", lambda tokenizer, *ids: "".join(f" {token} " for token in ids))
    asked = []

    def run(scores, activations, latents=(0,), margin=lambda prompt: 0.0, **options):
        asked.clear()

        def answer(judge, tokenizer, prompt):
            text = prompt.partition("Text: ")[2].partition("\n")[0]
            asked.append(text.replace("<<", "<").replace(">>", ">").split())
            return margin(prompt)

        monkeypatch.setattr(judge_scores, "_margin", answer)
        explanations = dict.fromkeys(latents, "a")
        given = {"judge_tokenizer": None, "show_progress": False, **options}
        return scores(activations, None, explanations, None, **given), [asked[::2], asked[1::2]]

    return run


def test_few_silent_contexts_stand_beside_strong_and_weak_ones(judged):
    strengths = [(0, 30 * context + 5, 100.0 - context) for context in range(97)]
    found, (firing, silent) = judged(detection_scores, hand_made([30] * 100, strengths))

    contexts = [int(text[0]) // 30 for text in firing]
    assert found[0].examples == 3 and [min(contexts) < 10, max(contexts) > 60] == [True, True]
    assert {int(text[0]) // 30 for text in silent} == {97, 98, 99}


def test_silent_texts_are_as_long_as_those_that_they_stand_beside(judged):
    """Most are shorter than the window, and one is longer."""
    lengths = [12, 15] * 100 + [40]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    activations = hand_made(lengths, [(0, starts[context] + 5, 1.0 + context % 10) for context in range(20)])
    found, (firing, silent) = judged(detection_scores, activations)

    assert found[0].examples == 10
    assert [len(text) for text in firing] == [len(text) for text in silent] == [15] * 5 + [12] * 5
    assert all(int(token) >= starts[20] for text in silent for token in text)
    # Without a context that is long enough the longest are left out, and not the latent.
    lengths = [40, 12, 40, 12, 12, 12]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    activations = hand_made(lengths, [(0, starts[context] + 5, 4.0 - context) for context in range(4)])
    found, (firing, silent) = judged(detection_scores, activations)
    assert found[0].examples == 2 and [len(text) for text in firing + silent] == [12] * 4


def test_only_tokens_that_were_read_are_marked_in_the_place_of_those_that_fire(judged):
    unread = [30 * context + place for context in range(40) for place in range(10)]
    firing = [(0, 30 * context + 15 + place, 1.0 + context) for context in range(20) for place in range(3)]
    found, (_, moved) = judged(fuzzing_scores, hand_made([30] * 40, firing, unread))

    marked = [int(token) for text in moved for i, token in enumerate(text) if is_marked(text, i)]
    assert found[0].examples == 10 and len(marked) == 30
    assert not {*marked} & {*unread} and not {*marked} & {position for _, position, _ in firing}


def is_marked(text, place):
    return text[place] not in "<>" and text[:place].count("<") > text[:place].count(">")


def test_a_score_does_not_depend_on_the_latents_asked_before(judged):
    activations = hand_made(
        [30] * 40, [(latent, 30 * c + 5 + latent, 1.0 + c) for latent in (0, 1) for c in range(20)]
    )
    options = {"margin": lambda prompt: zlib.crc32(prompt.encode()) % 1000 - 500}
    for scores in (detection_scores, fuzzing_scores):
        alone, texts = judged(scores, activations, [1], **options)
        after, _ = judged(scores, activations, [0, 1], **options)
        other_seed, others = judged(scores, activations, [1], seed=5, **options)
        assert alone[1] == after[1] and texts != others


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_judge_that_answers_with_no_number_is_refused(judged, value):
    activations = hand_made([30] * 40, [(0, 30 * context + 5, 1.0 + context) for context in range(20)])
    for scores in (detection_scores, fuzzing_scores):
        with pytest.raises(ValueError, match="got NaN or infinity: load the judge in bfloat16 or float32"):
            judged(scores, activations, margin=lambda prompt: value)
