"""The mechanics of a language model as judge: what it is shown, what it is asked, and what its answers are worth."""

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
