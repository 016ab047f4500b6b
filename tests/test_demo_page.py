"""The page at the end of the demo, of parts that were made and of parts that were not."""

import base64
import json
import re
import runpy
import sys

import pytest

from tests.example_module import EXAMPLES, load_example


@pytest.fixture
def outputs(monkeypatch, tmp_path):
    """A folder as the demo leaves it after its last part."""
    script = EXAMPLES / "hf_based_kernel" / "train_associative_recall.py"
    small = ["--max_steps", "3", "--num_pairs", "2", "--seq_len", "8", "--eval_examples", "50"]
    monkeypatch.setattr(sys, "argv", [str(script), *small, "--output_dir", str(tmp_path / "recall")])
    runpy.run_path(str(script), run_name="__main__")
    return tmp_path


def make_page(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["demo_page.py", *map(str, arguments)])
    load_example("studies/demo_page.py").main()


def test_page_shows_what_was_made_and_says_what_was_not(monkeypatch, outputs, capsys):
    make_page(monkeypatch, "--outputs", outputs)

    page = (outputs / "index.html").read_text()
    result = json.loads((outputs / "recall" / "associative_recall.json").read_text())
    assert f"{result['accuracy']:.3f} after (0.500 by guessing)" in page
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(picture) == (outputs / "recall" / "associative_recall.png").read_bytes()
    assert [f"<code>make demo-{name}</code>" in page for name in ("steer", "sae", "rebased")] == [True] * 3
    assert page.count("Not made yet") == 3
    assert "http" not in page.replace("http-equiv", "")
    assert str(outputs / "index.html") in capsys.readouterr().out


def test_answers_are_shown_as_text(monkeypatch, outputs):
    folder = outputs / "steer"
    folder.mkdir()
    (folder / "reward.png").write_bytes((outputs / "recall" / "associative_recall.png").read_bytes())
    answers = [["Is 1 < 2 & 2 > 1?", "1", "<script>alert(1)</script>", "1"]]
    result = {"before": 0.0, "after": 1.0, "steps": 7, "answers": answers}
    (folder / "result.json").write_text(json.dumps(result))
    make_page(monkeypatch, "--outputs", outputs)

    page = (outputs / "index.html").read_text()
    assert "<td>Is 1 &lt; 2 &amp; 2 &gt; 1?</td>" in page and "<script>" not in page
    assert "0.0% of 1 held-out questions right before, 100.0% after 7 steps" in page


def test_results_that_are_cut_or_another_examples_are_not_the_demos(monkeypatch, tmp_path):
    # What train_methods.py leaves, and a file that was cut short
    for name, text in (("steer", '{"before": {"greedy": null}}'), ("sae", '{"d_sae": 64, "lay')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    make_page(monkeypatch, "--outputs", tmp_path)

    page = (tmp_path / "index.html").read_text()
    assert [f"Not made yet: <code>make demo-{name}</code>" in page for name in ("steer", "sae")] == [True] * 2


def test_a_folder_that_is_not_there(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_page(monkeypatch, "--outputs", tmp_path / "nowhere")
    assert "--outputs must be a folder that `make demo` wrote to" in capsys.readouterr().err
