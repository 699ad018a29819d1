"""The page in a real browser: every view does its work, nothing leaves the machine, nothing is logged."""

import json
import re
import shutil

import pytest
from conftest import start_server

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("uvicorn")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs chromium")
expect = playwright.expect
expect.set_options(timeout=120_000)

PROBLEM = "<b>Anna</b> has 3 nuts. She buys 4 more nuts. How many nuts does she have now?"
# A failed request is reported in the page, but a browser logs it all the same.
NETWORK = "Failed to load resource"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser, lab_url):
    """A fresh page, which at the end must have logged nothing and asked nobody else."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    found, wrong = context.new_page(), []
    found.on("console", lambda m: NETWORK in m.text or wrong.append(m.text))
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("request", lambda r: r.url.startswith((lab_url, "blob:")) or wrong.append(r.url))
    found.goto(lab_url)
    expect(found.locator("#connection")).to_have_text("live")
    yield found
    context.close()
    assert wrong == []


def send(page, text: str, *models: str) -> None:
    """Asks these models, a pane each."""
    page.click("#nav-chat")
    page.select_option("#panes", str(len(models)))
    for i, name in enumerate(models):
        page.locator(".pane-model").nth(i).select_option(name)
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")


def test_runs_are_listed_charted_and_compared(page):
    expect(page.locator("tr[data-run=base][data-state=finished]")).to_contain_text("40 / 40")
    for name in ("base", "sft"):
        page.locator(f"tr[data-run={name}] .tick").check()
    loss = page.locator(".chart[data-chart=loss]")
    expect(loss).to_contain_text("base validation")
    expect(page.locator(".chart[data-chart=grad_norm]")).to_contain_text("sft")
    expect(page.locator("#compare")).to_contain_text("learning_rate")
    page.check("#chart-perplexity")
    expect(loss).to_contain_text("perplexity")
    page.reload()
    expect(page.locator("#chart-perplexity")).to_be_checked()
    expect(page.locator("tr[data-run=sft] .tick")).to_be_checked()


def test_a_run_has_settings_samples_and_a_text_through_its_checkpoints(page, lab_home):
    page.click("tr[data-run=base] .open")
    expect(page.locator("#samples li")).to_have_count(8)  # two at each of four evaluations
    page.fill("#walk-prompt", "Once upon")
    page.click("#walk-go")
    expect(page.locator("#walk-label")).to_have_text("final")
    page.locator("#walk-step").fill("0")
    expect(page.locator("#walk-label")).to_contain_text("step-")
    expect(page.locator("#settings")).to_contain_text("d_model")
    with open(lab_home / "base" / "samples.jsonl", "a") as file:
        file.write(json.dumps({"step": 41, "prompt": "", "text": "<i>late</i>"}) + "\n")
    expect(page.locator("#samples li")).to_have_count(9)  # the others stay
    expect(page.locator("#samples li").first).to_contain_text("<i>late</i>")


def test_a_run_is_planned_started_and_paused_from_the_page(page, lab_home):
    page.click("#nav-start")
    page.locator("#start-fields summary").nth(1).click()
    page.select_option("#start-config", "cpu")
    expect(page.locator("#field-d_model")).to_have_value("128")  # the file's value is there
    assert page.locator("#start-fields details").nth(1).evaluate("group => group.open")  # it stays open
    page.fill("#start-name", "from-page")
    changes = {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 2, "context_length": 32}
    changes |= {"batch_size": 4, "max_steps": 100_000, "log_every": 5, "eval_every": 0, "save_every": 0}
    changes |= {"tokens": str(lab_home / "tokens"), "device": "cpu", "dtype": "float32", "sample_tokens": 0}
    page.evaluate("document.querySelectorAll('#start-fields details').forEach((one) => (one.open = true))")
    for name, value in changes.items():
        control = page.locator(f"#field-{name}")
        enter = control.select_option if control.evaluate("e => e.tagName") == "SELECT" else control.fill
        enter(str(value))
    expect(page.locator("#start-go")).to_be_disabled()
    page.click("#start-plan")
    expect(page.locator("#start-text")).to_contain_text("the plan, for")
    page.click("#start-go")
    expect(page.locator(".chart[data-chart=loss]")).to_be_visible()  # it trains: a signal finds it ready
    page.click("#pause")
    expect(page.locator("#run-state")).to_have_text("interrupted")
    step = re.search(r"step [\d,]+ of", page.locator("#run-now").inner_text())[0]
    page.click("#resume")  # to the same bits: tests/test_serve.py
    expect(page.locator("#run-now")).not_to_contain_text(step)
    page.click("#pause")
    expect(page.locator("#run-state")).to_have_text("interrupted")


def test_panes_answer_the_same_question_and_a_reload_keeps_them(page, lab_url):
    words = page.locator(".reply .words")
    send(page, "Once upon a time", "base")
    page.keyboard.press("Escape")
    expect(page.locator("#chat-stop")).to_be_disabled()
    page.click("#chat-clear")
    expect(words).to_have_count(0)
    send(page, PROBLEM, "base", "sft")
    expect(page.locator(".reply .note")).to_contain_text(2 * ["tokens/s, seed"])
    expect(page.locator("#chat-stop")).to_be_disabled()
    expect(page.locator(".user b")).to_have_count(0)  # text is never markup
    expect(page.locator(".user")).to_have_text(PROBLEM)
    first = words.all_text_contents()
    page.reload()
    expect(words).to_have_text(first)
    with page.expect_download() as download:
        page.click("#chat-save")
    assert json.loads(download.value.path().read_text())["turns"][0]["user"] == PROBLEM
    other = page.context.new_page()  # begins with the same conversation, and goes its own way
    other.goto(f"{lab_url}#chat")
    expect(other.locator(".reply .words")).to_have_text(first)
    other.click("#chat-clear")
    page.reload()
    expect(words).to_have_text(first)
    page.click("#chat-again")
    expect(page.locator("#chat-stop")).to_be_disabled()
    page.click(".user + .edit")
    expect(page.locator("#chat-input")).to_have_value(PROBLEM)


def test_best_of_n_is_sorted_and_says_what_others_choose(page):
    page.click("#nav-chat")
    page.locator(".pane-model").select_option("sft")
    page.fill("#chat-input", PROBLEM)
    page.fill("#best-n", "5")
    page.click("#best-go")
    expect(page.locator("#verdict")).to_contain_text("The verifier chooses")
    expect(page.locator("#verdict")).to_contain_text("majority")
    shown = page.locator(".answer .probability").evaluate_all("all => all.map((one) => one.value)")
    assert len(shown) == 5 and max(shown) > 0
    assert "undefined" not in page.locator("#verdict").inner_text()


def test_look_inside_sums_and_switches(page):
    page.click("#nav-inside")
    page.select_option("#inside-model", "base")
    page.fill("#inside-text", "Two nuts")
    page.check("#inside-chat")  # what was only typed is looked at, not lost
    expect(page.locator("#inside-out")).to_contain_text("<|assistant|>")
    expect(page.locator("#inside-text")).to_have_value("Two nuts")
    page.uncheck("#inside-chat")
    page.fill("#inside-text", "Once upon a time")
    page.click("#inside-go")
    expect(page.locator(".token").last).to_contain_text("e")
    total, logit = (part.split()[-1] for part in page.locator("#parts-sum").inner_text().split(";"))
    assert float(total) == pytest.approx(float(logit), abs=1e-3)
    figures = page.locator("#next .figure")
    page.locator(".head").first.click(modifiers=["Shift"])
    expect(figures.first).to_contain_text("→")
    page.click("#heads-on")
    expect(figures.first).not_to_contain_text("→")
    page.locator("#next .grow").nth(1).click()
    expect(page.locator("#tree .node")).to_have_count(2)
    expect(page.locator("#lens")).to_contain_text("embedding")
    assert page.locator("#lens").evaluate("box => box.scrollWidth <= box.clientWidth")
    page.locator(".head").nth(3).click()
    expect(page.locator("#attention-facts")).to_contain_text("head 3")


def test_no_view_is_wider_than_the_window(page):
    wide = """width => [...document.querySelectorAll("*")].filter((e) => !e.closest(".scroll")
        && e.getBoundingClientRect().right > width).map((e) => e.outerHTML.slice(0, 90))"""
    filled = {"runs": "tr[data-run=base]", "start": ".field", "chat": ".pane-model", "inside": "#lens"}
    for scheme, width in (("light", 390), ("dark", 390), ("light", 1280), ("dark", 1920)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        for key, (section, content) in enumerate(filled.items(), 1):
            page.keyboard.press(str(key))
            expect(page.locator(f"#{section} {content}").first).to_be_visible()
            assert page.evaluate(wide, width) == []  # what scrolls in a box of its own may be wider


def test_a_damaged_storage_is_as_an_empty_one(page, lab_url):
    damage = {"lab.chat": "{bad", "lab.runs": '{"ticked": "abc"}', "lab.start": '{"stage": "nope"}'}
    for storage in ("localStorage", "sessionStorage"):
        page.evaluate(
            f"damage => Object.entries(damage).forEach((pair) => {storage}.setItem(...pair))", damage
        )
    page.goto(lab_url + "#%")
    page.reload()
    expect(page.locator("tr[data-run=base]")).to_be_visible()
    page.click("#nav-start")
    expect(page.locator("#field-max_steps")).to_be_visible()


def test_a_folder_without_runs_says_what_to_do(browser, tmp_path):
    url, server = start_server(tmp_path)
    page = browser.new_page()
    page.goto(url)
    expect(page.locator("#empty")).to_contain_text("bash run_all.sh cpu")
    for section in ("chat", "inside"):
        page.click(f"#nav-{section}")
        expect(page.locator(f"#{section}")).to_contain_text("No model yet")
    server.kill()
    server.wait()
    expect(page.locator("#connection")).to_have_text("no connection")
    page.close()
