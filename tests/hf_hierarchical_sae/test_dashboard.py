"""The dashboard: its numbers against loops over tokens, its behaviour in a headless browser."""

import base64
import copy
import gzip
import json
import math
import os
import re
import resource
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, read_latents, write_dashboard


K = 16
TEXTS = [
    "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer",
    "<script>window.stolen = 1</script> &amp; <b>bold</b> </script> {{ config }}",
    "日本語 and a smile 🙂",
    *("漢字試験勉強議論難読麒麟薔薇"[number:] for number in range(12)),
    *(f"the slings and arrows {number} of outrageous fortune" for number in range(40)),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_language_model):
    return AutoTokenizer.from_pretrained(tiny_language_model)


@pytest.fixture(scope="module")
def model(tiny_language_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_language_model)
    with torch.no_grad():
        # Away from ones, so that it shows whether the final norm's gain is taken into account.
        model.model.norm.weight.uniform_(0.2, 2.0)
    return model


def make_sae(**options):
    torch.manual_seed(0)
    return HierarchicalSaeModel(
        HierarchicalSaeConfig(**{"d_in": 32, "d_sae": 200, "k": K, "layer": 0, "model_name": "tiny", **options})
    ).eval()


def write(path, sae, model, tokenizer, texts=TEXTS, **options):
    return write_dashboard(sae, model, tokenizer, texts, path=path, show_progress=False, **options)


def data_of(path):
    """Everything that the page unpacks, by name; chunks and rows joined by latent."""
    blobs = re.findall(r'<script type="text/plain" id="([^"]+)">([^<]*)</script>', path.read_text(encoding="utf-8"))
    texts = {name: gzip.decompress(base64.b64decode(blob)).decode() for name, blob in blobs}
    data = {name: json.loads(text) for name, text in texts.items() if name != "plotting"}
    details = [detail for name in data if name.startswith("chunk-") for detail in data[name]]
    return data, {row[0]: (row, detail) for row, detail in zip(data["rows"], details)}


@pytest.fixture(scope="module")
def page(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("dashboard") / "folder" / "page.html"
    sae = make_sae()
    found = write(path, sae, model, tokenizer)
    return path, found, read_latents(sae, model, tokenizer, TEXTS, context_length=128, show_progress=False)


def strongest(activations, latent, k, count=10):
    """Largest activation of each context at budget k, the strongest contexts first."""
    best = {}
    for position, value, rank in zip(*(part.tolist() for part in activations.latent(latent))):
        context = int(activations.position_contexts[position])
        if rank <= k:
            best[context] = max(value, best.get(context, 0.0))
    return sorted(best.values(), reverse=True)[:count]


def test_the_page_holds_what_a_loop_over_tokens_gives(page):
    path, found, activations = page
    _, latents = data_of(path)

    assert sorted(latents) == activations.live_latents.tolist()
    assert found == {
        "tokens": activations.tokens,
        "live_latents": len(latents),
        "latents": len(latents),
        "bytes": path.stat().st_size,
    }
    for latent, (row, detail) in latents.items():
        _, values, ranks = activations.latent(latent)
        assert row[4] + [0] * (K - len(row[4])) == [int((ranks == rank).sum()) for rank in range(1, K + 1)]
        assert row[1] == detail["max"] == pytest.approx(values.max().item(), rel=1e-3)
        cells = torch.tensor(detail["histogram"][0]).cumsum(0)
        counts = torch.tensor(detail["histogram"][1])
        for k in (1, 5, K):
            # The page ranks what it holds; that this is enough for every budget is the claim.
            held = sorted(
                (max(v for v, r in zip(vs, rs) if r <= k) for _, _, vs, rs in detail["contexts"] if min(rs) <= k),
                reverse=True,
            )
            assert held[:10] == pytest.approx(strongest(activations, latent, k), rel=1e-3)
            assert counts[cells % K < k].sum() == (ranks <= k).sum()
        bins = (values / values.max() * 24).long().clamp(max=23)
        assert torch.bincount(cells // K, weights=counts.double(), minlength=24).tolist() == [
            (bins == number).sum() for number in range(24)
        ]


def test_promoted_tokens_and_neighbours_are_those_of_the_decoder(page, model, tokenizer):
    _, latents = data_of(page[0])
    sae, shown = make_sae(), list(latents)[:20]

    for latent in shown:
        direction = sae.W_dec[latent].detach()
        logits = (direction * model.model.norm.weight.detach()) @ model.lm_head.weight.detach().T
        detail = latents[latent][1]
        assert [score for _, score in detail["promoted"]] == pytest.approx(logits.topk(10).values.tolist(), rel=2e-3)
        lowest = logits.topk(10, largest=False).values.tolist()
        assert [score for _, score in detail["suppressed"]] == pytest.approx(lowest, rel=2e-3)
        assert detail["promoted"][0][0] == tokenizer.decode([int(logits.argmax())])
        cosines = F.cosine_similarity(direction, sae.W_dec.detach(), dim=1)
        cosines[latent] = -1
        assert [index for index, _ in detail["neighbours"]] == cosines.topk(8).indices.tolist()
        assert detail["neighbours"][0][1] == pytest.approx(cosines.max().item(), abs=1e-3)


def test_a_layer_norm_before_the_unembedding_is_followed_as_well(tokenizer, tmp_path):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes)).eval()
    with torch.no_grad():
        gpt2.transformer.ln_f.weight.uniform_(0.2, 2.0)
        gpt2.transformer.ln_f.bias.uniform_(-1, 1)
    sae, norm = make_sae(), gpt2.transformer.ln_f
    write(tmp_path / "page.html", sae, gpt2, tokenizer)
    _, latents = data_of(tmp_path / "page.html")

    for latent, (_, detail) in list(latents.items())[:20]:
        direction = sae.W_dec[latent].detach()
        logits = ((direction - direction.mean()) * norm.weight.detach()) @ gpt2.lm_head.weight.detach().T
        assert [score for _, score in detail["promoted"]] == pytest.approx(logits.topk(10).values.tolist(), rel=2e-3)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("olmo", {}),
        ("gemma4_text", {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "global_head_dim": 16}),
    ],
)
def test_a_norm_without_a_gain_and_one_of_several_norms_are_followed(kind, sizes, tokenizer, tmp_path):
    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **common, **tokens, **sizes, head_dim=16, num_key_value_heads=2)
    model, sae = AutoModelForCausalLM.from_config(config).eval(), make_sae(model_name=None)
    with torch.no_grad():
        for parameter in model.model.norm.parameters():
            parameter.uniform_(0.2, 2.0)
    write(tmp_path / "page.html", sae, model, tokenizer)

    weight = model.lm_head.weight.detach()
    for latent, (_, detail) in list(data_of(tmp_path / "page.html")[1].items())[:20]:
        direction = sae.W_dec[latent].detach()
        if kind == "olmo":
            direction = direction - direction.mean()
        else:
            direction = direction * model.model.norm.weight.detach()
        expected = (direction @ weight.T).topk(10).values.tolist()
        assert [score for _, score in detail["promoted"]] == pytest.approx(expected, rel=2e-3)


def test_what_does_not_reach_the_residual_stream_promotes_no_tokens(model, tokenizer, tmp_path):
    # As wide as the residual stream, but given to a matrix before it gets there.
    for hook_point in ("attention.heads", "self_attn.q_proj"):
        write(tmp_path / "page.html", make_sae(hook_point=hook_point), model, tokenizer)
        _, latents = data_of(tmp_path / "page.html")
        assert latents and not any(detail["promoted"] or detail["suppressed"] for _, detail in latents.values())

    write(tmp_path / "page.html", make_sae(hook_point="self_attn.o_proj"), model, tokenizer)
    assert all(len(detail["promoted"]) == 10 for _, detail in data_of(tmp_path / "page.html")[1].values())


def test_a_page_without_budgets_holds_the_strongest_contexts_of_all_latents_alone(model, tokenizer, tmp_path):
    sae = make_sae(selection="relu", k=200, budgets=[200])
    write(tmp_path / "page.html", sae, model, tokenizer)
    activations = read_latents(sae, model, tokenizer, TEXTS, context_length=128, show_progress=False)
    _, latents = data_of(tmp_path / "page.html")

    assert sorted(latents) == activations.live_latents.tolist() and activations.k > 50
    for latent, (row, detail) in latents.items():
        held = sorted((max(values) for _, _, values, _ in detail["contexts"]), reverse=True)
        assert held == pytest.approx(strongest(activations, latent, activations.k), rel=1e-3)
        assert row[4] == torch.bincount(activations.latent(latent)[2].long())[1:].tolist()


def test_characters_that_take_several_tokens_are_shown_whole(page):
    data, latents = data_of(page[0])
    pieces, contexts = data["text"]

    shown = {"".join(pieces[piece] for piece in context) for context in contexts}
    assert shown == set(TEXTS)
    context = next(context for context in contexts if pieces[context[0]] == "日")
    assert [pieces[piece] for piece in context[:3]] == ["日", "本", "語"] and "🙂" in [pieces[p] for p in context]
    for _, detail in latents.values():
        for number, places, _, _ in detail["contexts"]:
            assert places == sorted(places) and places[-1] < len(contexts[number])


def test_the_same_arguments_give_the_same_file(page, model, tokenizer, tmp_path):
    write(tmp_path / "again.html", make_sae(), model, tokenizer)

    assert (tmp_path / "again.html").read_bytes() == page[0].read_bytes()


def test_latents_that_do_not_fit_are_left_out_at_random_and_the_page_says_so(model, tokenizer, tmp_path):
    limit = 0.52
    found = write(tmp_path / "page.html", make_sae(), model, tokenizer, max_megabytes=limit)
    other = write(tmp_path / "other.html", make_sae(), model, tokenizer, max_megabytes=limit, seed=1)

    assert 0 < found["latents"] < found["live_latents"] and found["bytes"] == (tmp_path / "page.html").stat().st_size
    assert max(found["bytes"], other["bytes"]) <= limit * 1e6
    assert f"{found['latents']} of these are here, drawn at random" in (tmp_path / "page.html").read_text()
    assert set(data_of(tmp_path / "page.html")[1]) != set(data_of(tmp_path / "other.html")[1])


def test_chosen_latents_are_shown_alone(page, model, tokenizer, tmp_path):
    _, everything = data_of(page[0])
    chosen = list(everything)[:3]
    found = write(tmp_path / "page.html", make_sae(), model, tokenizer, latents=chosen)

    assert found["latents"] == 3 and "3 chosen ones are here" in (tmp_path / "page.html").read_text()
    assert {latent: row for latent, (row, _) in data_of(tmp_path / "page.html")[1].items()} == {
        latent: everything[latent][0] for latent in chosen
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"contexts_per_latent": 0}, "contexts_per_latent must be positive, got 0"),
        ({"latents": [3, 200]}, r"latents must be in \[0, d_sae=200\), got \[3, 200\]"),
        ({"max_megabytes": 0.3}, r"max_megabytes=0.3 has no room for any latent: the page .* takes 0\.4"),
        ({"layer": 1}, r"was trained on layer 0, the stream gives layer 1"),
        ({"texts": []}, "the texts gave no tokens"),
    ],
)
def test_what_cannot_be_shown_is_refused(options, message, model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "page.html", make_sae(), model, tokenizer, **options)


def test_latents_that_do_not_fire_cannot_be_chosen(model, tokenizer, tmp_path):
    sae = make_sae()
    with torch.no_grad():
        sae.b_enc[7] = -1e3

    with pytest.raises(ValueError, match=r"none of the latents \[7\] fires on the \d+ tokens"):
        write(tmp_path / "page.html", sae, model, tokenizer, latents=[7])


def test_a_model_without_an_unembedding_is_refused(tiny_language_model, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="with an unembedding, got a LlamaModel: load it with AutoModelForCausalLM"):
        write(tmp_path / "page.html", make_sae(), AutoModel.from_pretrained(tiny_language_model), tokenizer)


def test_the_missing_extra_is_named(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)

    with pytest.raises(ImportError, match=r'needs `pip install "hf_hierarchical_sae\[dashboard\]"`'):
        write(tmp_path / "page.html", make_sae(), model, tokenizer)


class Browser:
    """Headless Chromium on a page, and what the tests ask it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, address=""):
        from selenium.webdriver.support.wait import WebDriverWait

        self.driver.get("about:blank")
        self.driver.get(path.as_uri() + address)
        ready = "return document.body.dataset.ready === 'yes' || document.getElementById('problem').textContent"
        WebDriverWait(self.driver, 60).until(lambda driver: driver.execute_script(ready))
        assert not self.run("return document.getElementById('problem').textContent")

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def settle(self):
        """Two frames: changes are drawn at most once per frame."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def set_budget(self, k):
        self.run(
            "const k = document.getElementById('k'); k.value = arguments[0]; k.dispatchEvent(new Event('input'))", k
        )
        self.settle()

    def search(self, text):
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element("id", "search").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)
        self.settle()
        return int(self.text("count").split()[0].replace(",", ""))

    def text(self, name):
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def choose(self, latent):
        self.driver.execute_async_script("choose(arguments[0]).then(arguments[1])", latent)

    def peaks(self):
        return [
            float(text)
            for text in self.run("return [...document.querySelectorAll('.context b')].map(b => b.textContent)")
        ]

    def problems(self):
        """Messages in the console, and everything that was fetched."""
        fetched = self.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
        return [entry["message"] for entry in self.driver.get_log("browser")] + fetched


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "needs chromium and chromedriver on the path: `make browser` installs them on Debian and Ubuntu"
        assert "CI" not in os.environ, missing
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1500,1000"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(driver)
    driver.quit()


@pytest.mark.slow
def test_the_browser_loads_the_page_without_a_message_or_a_request(page, browser):
    browser.open(page[0])

    assert browser.run("return document.querySelectorAll('#overview svg, #use-chart svg, #histogram svg').length") == 3
    assert browser.run("return document.querySelectorAll('.row').length") > 10
    assert browser.problems() == []


@pytest.mark.slow
def test_text_that_looks_like_html_is_shown_as_text(page, browser):
    browser.open(page[0])
    data, latents = data_of(page[0])
    number = next(i for i, context in enumerate(data["text"][1]) if data["text"][0][context[0]] == "<")
    peaks = {
        latent: max((max(values), -context) for context, _, values, _ in detail["contexts"])
        for latent, (_, detail) in latents.items()
    }
    latent = next(latent for latent, (_, context) in peaks.items() if context == -number)

    browser.choose(latent)
    browser.run("document.querySelector('.context').click()")

    assert browser.run("return document.querySelector('.context .text').textContent") == TEXTS[1]
    assert browser.run(
        "return window.stolen === undefined && document.querySelectorAll('.context .text b').length === 0"
    )
    assert browser.problems() == []


@pytest.mark.slow
def test_searching_and_sorting_change_the_list(page, browser):
    browser.open(page[0])
    data, latents = data_of(page[0])
    everything = len(latents)
    matching = [row for row, _ in latents.values() if "q" in "\n".join([*row[2], *row[3]]).lower()]

    assert browser.search("") == everything
    assert 0 < browser.search("Q") == len(matching) < everything
    number = data["rows"][0][0]
    browser.search(str(number))
    listed = browser.run("return [...document.querySelectorAll('.row')].map(row => Number(row.dataset.latent))")
    assert number in listed
    assert browser.search("no latent holds this") == 0
    browser.search("")
    browser.run("document.querySelector('[data-sort=latent]').click()")
    listed = browser.run("return [...document.querySelectorAll('.row')].map(row => Number(row.dataset.latent))")
    assert listed == sorted(latents)[: len(listed)]
    browser.run("document.querySelector('[data-sort=density]').click()")
    first = browser.run("return Number(document.querySelector('.row').dataset.latent)")
    assert sum(latents[first][0][4]) == max(sum(row[4]) for row, _ in latents.values())
    assert browser.problems() == []


@pytest.mark.slow
def test_the_slider_ranks_and_shades_anew(page, browser):
    path, _, activations = page
    browser.open(path)
    shaded = "return [...document.querySelectorAll('.context .text span')].filter(s => s.style.background).length"
    of_peak = """return [...document.querySelectorAll('.context')].every(context => context.querySelector('.peak').title
        .startsWith(`activation ${context.querySelector('b').textContent}, rank`))"""
    within = """return [...document.querySelectorAll('.context .text span')]
        .filter(token => Number(/rank (.+) in/.exec(token.title)?.[1]) <= state.k).length"""
    latent = max(activations.live_latents.tolist(), key=lambda i: len(activations.latent(i)[1].unique()))
    browser.choose(latent)
    seen = []
    for k in (K, 6, 2, 1, K):
        browser.set_budget(k)
        assert browser.peaks() == pytest.approx(strongest(activations, latent, k), rel=1e-3)
        assert browser.run(of_peak) and browser.run(within) == browser.run(shaded)
        uses = int((activations.latent(latent)[2] <= k).sum())
        assert f"({uses:,}) at k = {k}" in browser.text("facts")
        used = sum(int((activations.latent(i)[2] <= k).any()) for i in activations.live_latents)
        assert f"{used} of them used at k = {k}" in browser.text("count")
        seen.append((browser.run(shaded), browser.run("return document.querySelectorAll('.text .rest').length")))
    assert seen[0] == seen[-1] and seen[0][1] == 0
    assert seen[1][0] < seen[0][0] and seen[1][1] > 0
    heights = browser.run(
        "return charts.histogram.data('bins').map(bin => [bin.all, bin.used])",
    )
    assert sum(used for _, used in heights) == len(activations.latent(latent)[1])
    assert browser.problems() == []


@pytest.mark.slow
def test_the_address_leads_back_to_the_same_view(page, browser):
    path, _, activations = page
    latent = int(activations.live_latents[5])

    browser.open(path, f"#latent={latent}&k=3")

    assert browser.text("detail").startswith(f"Latent {latent}") and browser.text("k-shown") == "3"
    browser.set_budget(7)
    assert browser.run("return location.hash") == f"#latent={latent}&k=7"


@pytest.mark.slow
def test_only_latents_used_at_the_budget_can_be_listed(page, browser):
    path, _, activations = page
    browser.open(path)
    browser.set_budget(1)
    browser.driver.find_element("id", "only-used").click()
    browser.settle()

    used = sum(int((activations.latent(i)[2] == 1).any()) for i in activations.live_latents)
    assert browser.text("count").startswith(f"{used} latents listed")


@pytest.mark.slow
def test_a_batch_topk_autoencoder_has_no_slider(model, tokenizer, browser, tmp_path):
    sae = make_sae(selection="batch_topk", budgets=[K])
    sae.threshold.fill_(0.005)
    write(tmp_path / "page.html", sae, model, tokenizer)

    browser.open(tmp_path / "page.html")

    assert not browser.driver.find_element("id", "budget").is_displayed()
    assert browser.peaks() and browser.problems() == []


@pytest.mark.slow
def test_a_dictionary_of_100_000_latents_fits_and_stays_quick(model, tokenizer, browser, tmp_path):
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(33, 127, (100, 120), generator=generator).tolist()
    sae = make_sae(d_sae=100_000, k=32)

    found = write(
        tmp_path / "page.html", sae, model, tokenizer, [bytes(row).decode() for row in letters], max_megabytes=2
    )

    assert found["live_latents"] > 2 * found["latents"] > 2000 and found["bytes"] <= 2e6
    browser.open(tmp_path / "page.html")
    assert browser.run("return document.querySelectorAll('.row').length") < 100
    browser.run("const list = document.getElementById('list'); list.scrollTop = list.scrollHeight")
    browser.settle()
    last = browser.run("return [...document.querySelectorAll('.row')].at(-1).dataset.latent")
    assert last == browser.run("return String(listed.at(-1).latent)")
    assert browser.search("a") > 0
    assert browser.problems() == []


@pytest.mark.parametrize(
    "texts, options, message",
    [
        ([], {}, "the texts gave no tokens"),
        (TEXTS, {"latents": [7.5]}, r"latents must be integers, got \[7.5\]"),
        (TEXTS, {"latents": [True]}, r"latents must be integers, got \[True\]"),
        (TEXTS, {"contexts_per_latent": True}, "contexts_per_latent must be an integer, got True"),
        (TEXTS, {"max_megabytes": -1}, "max_megabytes must be a positive number, got -1"),
        (TEXTS, {"max_megabytes": math.nan}, "max_megabytes must be a positive number, got nan"),
        (TEXTS, {"max_megabytes": math.inf}, "max_megabytes must be finite, got inf"),
        (TEXTS, {"max_megabytes": "9"}, "max_megabytes must be a positive number, got '9'"),
        (TEXTS, {"max_megabytes": 0.1}, "has no room for any latent"),
        (TEXTS, {"max_tokens": 0}, "max_tokens must be positive or None"),
        (TEXTS, {"layer": 1.0}, "layer must be an integer, got 1.0"),
        (TEXTS, {"context_length": 512}, "has 256 positions: context_length must be at most 256, got 512"),
        ({"train": TEXTS, "validation": TEXTS}, {}, "got a dict of .'train', 'validation'.: choose one of its splits"),
        ("to be or not to be", {}, "got a single str: put a text in a list"),
    ],
)
def test_a_refused_call_leaves_nothing_and_an_older_page_as_it_was(
    model, tokenizer, tmp_path, texts, options, message
):
    (tmp_path / "older.html").write_text("older")
    for path in (tmp_path / "older.html", tmp_path / "new" / "page.html"):
        with pytest.raises(ValueError, match=message):
            write(path, make_sae(), model, tokenizer, texts, **options)

    assert [path.name for path in tmp_path.iterdir()] == ["older.html"]
    assert (tmp_path / "older.html").read_text() == "older"


def test_a_full_disk_leaves_the_older_page(model, tokenizer, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(path, make_sae(), model, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and path.read_text() == "older"


def test_a_path_that_cannot_be_written_fails_before_the_work(model, tokenizer, tmp_path):
    with pytest.raises(IsADirectoryError, match="expected a file to write, got the folder"):
        write(tmp_path, make_sae(), model, tokenizer, (1 / 0 for _ in range(1)))


@pytest.mark.parametrize(
    "part, message",
    [
        ("lm_head.weight", "finite weights in the language model's final norm and unembedding"),
        ("model.norm.weight", "finite weights in the language model's final norm and unembedding"),
        ("W_dec", "expected an autoencoder of finite weights"),
        ("b_enc", "expected an autoencoder of finite weights"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_no_page_can_hold_are_refused(model, tokenizer, tmp_path, part, message, value):
    model, sae = copy.deepcopy(model), make_sae()
    parameters = {**dict(model.named_parameters()), **dict(sae.named_parameters())}
    with torch.no_grad():
        parameters[part].view(-1)[5] = value

    with pytest.raises(ValueError, match=message):
        write(tmp_path / "page.html", sae, model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_tensors_choose_latents(model, tokenizer, page, tmp_path):
    live = page[2].live_latents[:3]
    for latents in (live, live.numpy(), list(live.numpy())):
        found = write(tmp_path / "page.html", make_sae(), model, tokenizer, latents=latents)
        assert found["latents"] == 3


def test_an_autoencoder_in_half_precision_gets_a_page(model, tokenizer, tmp_path):
    found = write(tmp_path / "page.html", make_sae().bfloat16(), model, tokenizer)

    assert found["latents"] == len(data_of(tmp_path / "page.html")[1]) > 0
