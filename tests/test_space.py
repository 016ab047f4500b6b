"""The page of examples/space in headless Chromium, with a tiny random model, adapter and autoencoder."""

import os
import re
import shutil
import socket
import subprocess
import time
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_hierarchical_sae import HierarchicalSaeConfig, HierarchicalSaeModel, read_latents
from peft_bias_steer import from_vectors, steering_vectors
from tests.environments import python_with
from tests.example_module import load_example


REPOSITORY = Path(__file__).parents[1]
SPACE = REPOSITORY / "examples" / "space"
SENTENCE = "to be or not"
K = 6
# gradio's pins and those of the other tests exclude each other.
pytestmark = [pytest.mark.slow, pytest.mark.pinned]


@pytest.fixture(scope="module")
def folders(tiny_language_model, tmp_path_factory):
    """Folders of a model, of two adapters in one place, and of an autoencoder of its second layer."""
    folder = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    for name in ("first", "second"):
        base = AutoModelForCausalLM.from_pretrained(tiny_language_model)
        from_vectors({1: 3 * torch.randn(32)}, base).save_pretrained(folder / "adapters" / name)
    sae = HierarchicalSaeModel(HierarchicalSaeConfig(d_in=32, d_sae=64, k=K, layer=1, hook_point="output"))
    sae.save_pretrained(folder / "sae")
    return {"model": tiny_language_model, "adapters": folder / "adapters", "sae": folder / "sae"}


class Page:
    """The app in a process of its own, and a browser that looks at it."""

    def __init__(self, driver, address):
        self.driver, self.address = driver, address

    def open(self):
        self.driver.get("about:blank")
        self.driver.get(self.address)
        self.wait(lambda: self.driver.find_elements("css selector", "#question textarea"))

    def wait(self, condition, seconds=60):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        waiting = WebDriverWait(self.driver, seconds, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda driver: condition())

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def texts(self, selector):
        return [element.text for element in self.driver.find_elements("css selector", selector)]

    def type(self, name, text):
        from selenium.webdriver.common.keys import Keys

        box = self.find(f"#{name} textarea")
        box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)

    def slide(self, name, value):
        """Move a slider with the keyboard to its start, and from there to a value, as many steps as it takes."""
        from selenium.webdriver.common.keys import Keys

        slider = self.find(f"#{name} input[type=range]")
        steps = round((value - float(slider.get_attribute("min"))) / float(slider.get_attribute("step")))
        slider.send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * steps)
        self.driver.execute_script(
            "arguments[0].dispatchEvent(new PointerEvent('pointerup', {bubbles: true}))", slider
        )
        assert float(slider.get_property("value")) == pytest.approx(value)

    def activations_in_table(self):
        return sum(cell.count("(") for cell in self.texts("#table [role=gridcell]"))

    def answer(self, name):
        return (self.texts(f"#{name} .bot .prose, #{name} .bot [data-testid=bot]") or [""])[-1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the app with options; all that were started end with the tests."""
    running, python = [], python_with("gradio", ".venv-space")

    def run(*options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("log") / "app.txt"
        environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)}
        with log.open("w") as file:
            command = [python, str(SPACE / "app.py"), *map(str, options)]
            process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=file, stderr=file)
        running.append(process)
        for _ in range(600):
            if process.poll() is not None:
                return None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}/", log
            time.sleep(0.2)
        raise TimeoutError(log.read_text())

    yield run
    for process in running:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def page(start, folders, tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "needs chromium and chromedriver on the path: `make browser` installs them on Debian and Ubuntu"
        assert "CI" not in os.environ, missing
        pytest.skip(missing)
    from selenium import webdriver

    options = [word for name, value in folders.items() for word in (f"--{name}", value)]
    address, log = start(*options, "--max_new_tokens", 6)
    assert address, log
    settings = webdriver.ChromeOptions()
    settings.binary_location = chromium
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    flags += ["disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1400,1200"]
    for flag in [*flags, f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        settings.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=settings, service=webdriver.ChromeService(driver))
    yield Page(driver, address)
    driver.quit()


def test_both_answers_come_side_by_side_and_the_slider_writes_one_anew(page, folders):
    page.open()
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    messages = [{"role": "user", "content": "hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()

    page.slide("strength", 1)
    page.type("question", "hello")
    page.find("#send").click()
    page.wait(lambda: page.answer("plain") and page.answer("steered"))
    page.wait(lambda: page.answer("plain").split() == expected)
    plain, steered = page.answer("plain"), page.answer("steered")
    assert steered != plain
    page.slide("strength", 0)
    page.wait(lambda: page.answer("steered") == plain)
    page.slide("strength", 1)
    page.wait(lambda: page.answer("steered") == steered)

    assert page.answer("plain") == plain
    assert page.texts("#plain .user") == page.texts("#steered .user") != []
    page.find("#clear").click()
    page.wait(lambda: not page.texts("#plain .bot"))


def test_empty_and_too_long_questions_get_a_sentence(page):
    page.open()
    page.find("#send").click()
    page.wait(lambda: "Type a question first" in page.find("#notice").text)
    page.type("question", "x" * 300)
    page.find("#send").click()

    page.wait(lambda: re.search(r"would have \d+ tokens, and there is room for 250", page.find("#notice").text))
    assert not page.texts("#plain .bot")


def test_latents_colour_a_sentence_at_every_budget(page, folders):
    page.open()
    next(tab for tab in page.driver.find_elements("css selector", "[role=tab]") if tab.text == "Latents").click()
    page.wait(lambda: page.find("#sentence textarea").is_displayed())
    sae = HierarchicalSaeModel.from_pretrained(folders["sae"])
    model = AutoModelForCausalLM.from_pretrained(folders["model"])
    tokenizer = AutoTokenizer.from_pretrained(folders["model"])
    found = read_latents(sae, model, tokenizer, [SENTENCE], show_progress=False)

    page.type("sentence", SENTENCE)
    page.find("#read").click()
    for budget in (K, 2):
        page.slide("budget", budget)
        page.wait(lambda budget=budget: page.activations_in_table() == int((found.ranks <= budget).sum()))
        latent = int(page.find("#latent input").get_property("value"))
        _, _, ranks = found.latent(latent)
        lit = int((ranks <= budget).sum())
        page.wait(lambda lit=lit: len(page.texts("#tokens .token.highlighted")) == lit)
    page.type("sentence", "")
    page.find("#read").click()
    page.wait(lambda: "Type a sentence first" in page.find("#latents-notice").text)


def test_every_control_has_a_label_and_nothing_comes_from_elsewhere(page):
    page.open()
    unnamed = "return [...document.querySelectorAll('input, textarea')].filter(e => !(e.labels?.length || "
    unnamed += "e.getAttribute('aria-label') || e.closest('label'))).map(e => e.outerHTML)"
    fetched = "return performance.getEntriesByType('resource').map(entry => entry.name)"

    assert page.driver.execute_script(unnamed) == []
    assert [name for name in page.driver.execute_script(fetched) if not name.startswith((page.address, "data:"))] == []
    assert {"Adapter", "Strength of the adapter", "Question"} <= set(re.split(r"\n+", page.find("body").text))


@pytest.mark.parametrize(
    "option, message",
    [
        ("adapters", "--adapters: expected a folder with an adapter_config.json in it"),
        ("sae", "--sae: expected a folder or a Hub id"),
        ("model", "--model: expected a folder or a Hub id"),
        ("max_new_tokens", r"--max_new_tokens must be in \[1, 255\] for this model, got 256"),
    ],
)
def test_an_option_that_does_not_fit_gets_a_sentence(folders, tmp_path, option, message):
    given = {"model": folders["model"], "adapters": [], "sae": None, "max_new_tokens": 6}
    given[option] = {"adapters": [str(tmp_path)], "max_new_tokens": 256}.get(option, str(tmp_path))

    with pytest.raises(SystemExit, match=message):
        load_example("space/app.py").load(Namespace(**given))


@pytest.mark.parametrize("strength", [None, float("nan"), "1"])
def test_a_strength_that_is_no_number_gets_a_sentence_and_ends(folders, strength):
    app = load_example("space/app.py")
    given = {"model": folders["model"], "adapters": [str(folders["adapters"] / "first")], "sae": None}
    model, tokenizer, names, _ = app.load(Namespace(**given, max_new_tokens=6))
    chat, adapter, said = app.Chat(model, tokenizer, names, 6), next(iter(names)), [{"role": "user", "content": "a"}]

    for answer in (chat.ask, chat.steer_again):
        ((question, plain, steered, notice),) = answer("hello", said, said, adapter, strength)
        assert (question, plain, steered) == ("hello", said, said) and "must be a finite number" in notice
    # what fails in the thread ends the stream too
    model.set_scale = Mock(side_effect=ValueError("refused"))
    with pytest.raises(ValueError, match="refused"):
        list(chat.ask("hello", [], [], adapter, 1.0))


def test_without_an_adapter_one_is_made_and_checkpoints_are_no_adapters(folders, tmp_path):
    app = load_example("space/app.py")
    shutil.copytree(folders["adapters"] / "first", tmp_path / "checkpoint-10")
    shutil.copytree(folders["adapters"] / "first", tmp_path / "adapter")
    model, _, names, _ = app.load(Namespace(model=folders["model"], adapters=[], sae=None, max_new_tokens=6))

    assert app.find_adapters([str(tmp_path), "user/hub-id"]) == [str(tmp_path / "adapter"), "user/hub-id"]
    assert list(names.values()) == list(model.peft_config) and "happy" in next(iter(names))
    assert steering_vectors(model, "adapter_0")[1].norm() > 0


def test_front_matter_is_what_a_space_and_the_makefile_read():
    front = dict(re.findall(r"^(\w+): (\S.*)$", (SPACE / "README.md").read_text().split("---")[1], re.MULTILINE))

    assert front["sdk"] == "gradio" and (SPACE / front["app_file"]).is_file()
    assert re.fullmatch(r"\d+\.\d+\.\d+", front["sdk_version"])
    assert "sed -n 's/^sdk_version: //p' examples/space/README.md" in (REPOSITORY / "Makefile").read_text()
