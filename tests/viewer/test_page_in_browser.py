"""The page in a real browser: what it shows, by mouse and keyboard, and that hostile answers stay text."""

import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import uvicorn

from dirl_cli.rollout.storage import rollout_path, write_rollout
from dirl_cli.types import Problem
from dirl_cli.viewer import served_answers
from dirl_cli.viewer.answer_sources import read_source
from dirl_cli.viewer.html_page import page
from dirl_cli.viewer.page_server import listener_on, page_app
from dirl_cli.viewer.payload import TokenReader, payload
from tests.helpers.browser import browser, missing_browser
from tests.helpers.shown_answers import (
    FIVE,
    FOUR,
    WORDS,
    Words,
    completions_of,
    evaluation_of,
    record,
    run_of,
    trajectory,
)
from tests.viewer.test_page_server import served

pytestmark = [pytest.mark.browser, pytest.mark.skipif(missing_browser() is not None, reason=str(missing_browser()))]


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        opened.resize(1400, 900)
        yield opened


@pytest.fixture
def show(window, tmp_path):
    """Opens the page of some answers; afterwards nothing may have complained."""

    def write_and_open(*paths, at=""):
        sources = [read_source(path, 100_000) for path in paths]
        file = tmp_path / "page.html"
        file.write_text(page(payload(sources, [TokenReader(Words())] * len(sources), "dirl view it")))
        window.open(file, at)
        return window

    window.prefer()
    window.complaints()
    yield write_and_open
    assert window.complaints() == []


def masked(window):
    return window.run(
        "return [...document.querySelectorAll('.token[data-i]')].map(t => t.classList.contains('masked'))"
    )


def test_it_says_what_is_shown_and_shows_the_first_answer(show, tmp_path):
    window = show(run_of(tmp_path / "words"))
    assert window.text("h1") == "words"
    assert window.text("#summary") == "4 answers to 1 problem in 2 steps (1 to 2) of a reinforcement run."
    assert "two plus two?" in window.text("#question")
    assert window.text("#shown .faint").startswith(
        "✓ right · step 1 of the run · sample 0 · reward 1 · advantage 1 · 1 token in 3"
    )
    assert "The 2 answers to this problem in step 1" in window.text("#others")
    assert "The same problem at other steps" in window.text("#others")
    assert window.run("return document.querySelectorAll('#shown .block').length") == 1


def test_the_slider_by_keys_hides_and_reveals_tokens_in_the_order_of_the_forwards(show, tmp_path):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    assert masked(window) == [False] * 7 and window.text("#moment") == "after forward 4 of 4"
    window.press("home")
    assert masked(window) == [True] * 7 and window.text("#moment").startswith("all masked")
    window.press("right")
    assert masked(window) == [False, False, True, True, True, True, True]
    window.press("right", "right")
    assert masked(window) == [False] * 5 + [True] * 2
    window.press("end")
    assert masked(window) == [False] * 7


def test_playback_shows_every_forward_and_ends_with_the_whole_answer(show, tmp_path):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    window.run(
        "window.seen = []; new MutationObserver(() => seen.push($('moment').textContent))"
        ".observe($('moment'), { childList: true })"
    )
    window.press(" ")
    ends = time.monotonic() + 60
    while window.run("return state.playing !== null || seen.length < 5"):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert window.run("return seen") == [
        "all masked, before the first forward",
        *(f"after forward {forward} of 4" for forward in (1, 2, 3, 4)),
    ]
    assert window.text("#play") == "Play" and masked(window) == [False] * 7


def test_a_token_tells_its_numbers_to_mouse_and_keyboard(show, tmp_path):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    move = "document.querySelector('[data-i=\"2\"]').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    window.run(move)
    told = window.text("#tip")
    assert '"four"' in told and "token 3 of 7, in block 1" in told
    assert "revealed at forward 2, step 2 of its block" in told and "probability 0.5, log-prob −0.693" in told
    window.run("document.querySelector('#shown .tokens').focus()")
    window.press("right", "right")
    assert "token 2 of 7" in window.text("#tip")
    assert window.text("#moment") == "after forward 4 of 4"


def test_the_list_is_walked_filtered_and_sorted(show, tmp_path):
    window = show(run_of(tmp_path / "words", steps=3))
    window.press("down")
    assert window.text("#shown h2") == "answer 2" and window.run("return location.hash") == "#2"

    def listed(script):
        window.run(script + "; document.getElementById('filters').dispatchEvent(new Event('input'))")
        return window.run("return state.listed.map(answer => answer.place + 1)")

    assert listed("$('correctness').value = 'wrong'") == [2, 4, 6]
    assert listed("$('step').value = '3'") == [6]
    assert listed("$('filters').reset(); $('search').value = 'FIVE='") == [2, 4, 6]
    assert listed("$('filters').reset(); $('reward-least').value = '0.5'") == [1, 3, 5]
    assert listed("$('filters').reset(); $('length-most').value = '1'; $('sort').value = 'length'") == [1, 3, 5]
    assert listed("$('filters').reset(); $('sort').value = '-reward'") == [2, 4, 6, 1, 3, 5]
    window.run("document.querySelector('#steps button:nth-child(2)').click()")
    assert window.run("return state.listed.map(answer => answer.step)") == [2, 2]


def test_answers_without_a_reward_come_last_in_either_order(show, tmp_path):
    window = show(completions_of(tmp_path / "a"), run_of(tmp_path / "words", steps=1), completions_of(tmp_path / "b"))
    for order, places in (("reward", [2, 3, 1, 4]), ("-reward", [3, 2, 1, 4])):
        window.run(f"$('sort').value = '{order}'; $('filters').dispatchEvent(new Event('input'))")
        assert window.run("return state.listed.map(answer => answer.place + 1)") == places
    marks = window.run("return [...document.querySelectorAll('#rows .facts')].map(facts => facts.innerText[0])")
    assert marks == ["✗", "✓", "1", "4"]


def test_keys_typed_into_the_search_are_letters(show, tmp_path):
    window = show(run_of(tmp_path / "words"))
    window.press("/")
    window.press("n", "k", " ")
    assert window.run("return $('search').value") == "nk "
    assert window.run("return state.pinned") is None


def test_two_sources_answer_a_problem_side_by_side(show, tmp_path):
    first = completions_of(tmp_path / "a", answers=(FOUR,))
    window = show(first, completions_of(tmp_path / "b", answers=(FIVE,)))
    heads = window.run("return [...document.querySelectorAll('#shown h2')].map(head => head.innerText)")
    assert heads == ["a: answer 1", "b: answer 2"]
    window.press("home", "right", "right")
    assert masked(window) == [False] * 3 + [False] * 3 + [True] * 4  # one slider for both: the first is whole by now


def test_an_answer_stays_beside_the_next_ones(show, tmp_path):
    window = show(run_of(tmp_path / "words"))
    window.press("K")  # as with the capitals locked
    window.press("down")
    heads = window.run("return [...document.querySelectorAll('#shown h2')].map(head => head.innerText)")
    assert heads == ["words: answer 2", "words: answer 1"]


def test_an_evaluation_shows_texts_and_nothing_to_play(show, tmp_path):
    window = show(evaluation_of(tmp_path / "a"), evaluation_of(tmp_path / "b", "five"))
    assert window.run("return [...document.querySelectorAll('#shown .tokens')].map(t => t.innerText)") == [
        "four",
        "five",
    ]
    assert window.run("return getComputedStyle($('slider')).display") == "none"
    assert "credit 1" in window.text("#shown .faint")


@pytest.mark.parametrize("colour", ["step", "order", "probability", "logprob"])
def test_every_colour_has_a_legend_and_numbers(show, tmp_path, colour):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    while window.run("return state.colour") != colour:
        window.press("c")
    window.press("n")
    shares = window.run(
        "return [...document.querySelectorAll('[data-i]')].map(t => t.style.getPropertyValue('--share'))"
    )
    texts = window.run("return [...document.querySelectorAll('[data-i] .number')].map(number => number.innerText)")
    assert (
        texts[:3]
        == {
            "step": ["1", "1", "2"],
            "order": ["1", "1", "2"],
            "probability": ["0.50"] * 3,
            "logprob": ["−0.69"] * 3,
        }[colour]
    )
    assert float(shares[2]) == {"step": 1, "order": 0.333, "probability": 0.5, "logprob": 0.139}[colour]
    assert window.text("#legend") in ("step 1\nlast step", "first\nlast", "1\n0", "0\n−5 or less")


def test_entropies_are_a_colour_where_an_answer_has_them(show, tmp_path):
    recorded = replace(FOUR, entropies=[1.5, 0.0, 6.0])
    window = show(completions_of(tmp_path / "a", answers=(recorded,)), completions_of(tmp_path / "b", answers=(FIVE,)))
    window.press("c", "c", "c", "c", "n")
    assert window.run("return state.colour") == "entropy" and window.text("#legend") == "0\n3 nats or more"
    tokens = "return [...document.querySelectorAll('[data-i]')].slice(0, 4)"
    assert window.run(f"{tokens}.map(t => t.style.getPropertyValue('--share'))") == ["0.500", "0.000", "1.000", "0.000"]
    assert window.run(f"{tokens}.map(t => t.querySelector('.number').innerText)") == ["1.50", "0.00", "6.00", ""]
    window.run("document.querySelector('[data-i]').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    assert "entropy 1.5 nats" in window.text("#tip")


def test_hostile_answers_are_text(show, tmp_path, monkeypatch):
    hostile = "</script><img src=x onerror=\"document.title='owned'\"><b>\u202eevil\u202c\x00"
    monkeypatch.setitem(WORDS, 5, hostile)
    problem = Problem(hostile, hostile, hostile, "", hostile)
    shown = [record(FOUR, 0, problem, reward=1.0, parts={hostile: 1.0, "b": 2.0}, advantage=1.0, learned_from=True)]
    write_rollout(rollout_path(tmp_path / hostile.replace("/", "").replace("\0", ""), 1), shown)
    [directory] = tmp_path.iterdir()
    window = show(directory)
    window.run("document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
    window.run("document.querySelector('[data-i]').dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))")
    time.sleep(0.2)
    assert window.run("return document.title") != "owned"
    assert window.run("return document.querySelectorAll('img, #shown b, #question b').length") == 0
    assert "</script><img src=x" in window.text("#shown .tokens") and "⟨U+202E⟩evil" in window.text("#shown .tokens")
    assert "\u202e" not in window.run("return document.body.innerText")


def test_a_megabyte_of_text_is_shown_when_it_is_asked_for(show, tmp_path):
    window = show(evaluation_of(tmp_path / "a", text="x" * 1_000_000, question="q" * 1_000_000))
    assert len(window.run("return document.body.innerText")) < 20_000
    window.run("document.querySelector('#shown .tokens button').click()")
    assert len(window.text("#shown .tokens")) == 1_000_000
    window.run("$('search').value = 'xxxy'; filter()")
    assert window.text("#count") == "0 of 1 answer"


def test_words_from_right_to_left_are_read_so(show, tmp_path, monkeypatch):
    monkeypatch.setitem(WORDS, 5, "مرحبا")
    monkeypatch.setitem(WORDS, 6, " عالم")
    window = show(completions_of(tmp_path / "a", answers=(trajectory([5, 6, 9], [1, 1, 1]),)))
    left = window.run("return [...document.querySelectorAll('[data-i]')].map(t => t.getBoundingClientRect().left)")
    assert left[0] > left[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("colour", ["step", "probability"])
def test_tokens_are_legible_light_and_dark(show, tmp_path, scheme, colour):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    window.prefer(scheme)
    while window.run("return state.colour") != colour:
        window.press("c")
    # Painted on a canvas, a colour of any notation becomes red, green and blue.
    contrasts = window.run(
        """
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const luminance = (colour) => {
          canvas.fillStyle = colour;
          canvas.fillRect(0, 0, 1, 1);
          const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((channel) =>
            channel / 255 <= 0.04045 ? channel / 255 / 12.92 : ((channel / 255 + 0.055) / 1.055) ** 2.4);
          return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        return [...document.querySelectorAll("[data-i]:not(.tail)")].map((token) => {
          const { color, backgroundColor } = getComputedStyle(token);
          const [a, b] = [luminance(color), luminance(backgroundColor)];
          return Math.max(a, b) / Math.min(a, b);
        });
        """
    )
    assert min(contrasts) >= 4.5, contrasts


def test_a_print_has_the_answer_with_numbers_and_no_list(show, tmp_path):
    window = show(completions_of(tmp_path / "a", answers=(FIVE,)))
    window.prefer(media="print")
    visible = "return getComputedStyle(document.querySelector('{}')).display"
    assert window.run(visible.format("aside")) == window.run(visible.format("#slider")) == "none"
    assert window.run(visible.format("[data-i] .number")) == "inline"
    assert window.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_ten_thousand_answers_open_in_under_three_seconds(show, tmp_path):
    """Seconds of the page's main thread, so that a busy machine does not decide."""
    long = trajectory([1, 2, 3, 4] * 25 + [9], [1, 2, 1, 2] * 25 + [1], prompt=3)
    answers = [
        record(long, sample % 8, Problem(f"sum-{sample // 8}", "two?", "four"), reward=1.0) for sample in range(10_000)
    ]
    write_rollout(rollout_path(tmp_path / "rollouts", 1), answers)
    window = show(tmp_path)
    window.devtools("Performance.disable")
    window.devtools("Performance.enable", timeDomain="threadTicks")
    window.run("location.reload()")
    ends = time.monotonic() + 60
    while not window.run("return document.body?.dataset.ready"):
        assert time.monotonic() < ends
    metrics = {entry["name"]: entry["value"] for entry in window.devtools("Performance.getMetrics")["metrics"]}
    rows = window.run("return document.querySelectorAll('.entry').length")
    assert metrics["TaskDuration"] < 3
    assert 5 < rows < 60
    window.run("$('list').scrollTop = 48 * 9990")
    time.sleep(0.3)
    assert "10000" in window.text("#rows")


@contextmanager
def served_at(answers, names):
    """The address of a page that is served by this process."""
    listener = listener_on(0)
    app = page_app(page(answers.head(names), is_served=True), answers, "key")
    config = uvicorn.Config(app, http="h11", lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/key/"
    finally:
        server.should_exit = True
        thread.join()


def test_a_served_page_asks_for_what_it_shows(window, tmp_path, monkeypatch):
    monkeypatch.setattr(served_answers, "PIECE", 5)
    hostile = "<img src=x onerror=\"document.title='owned'\">"
    monkeypatch.setitem(WORDS, 5, hostile)
    answers = served(run_of(tmp_path / "words", steps=20))
    window.prefer()
    window.complaints()
    with served_at(answers, ["words"]) as address:
        window.visit(address)
        assert window.text("#summary") == "40 answers in 20 steps of a reinforcement run."
        assert hostile in window.text("#shown .tokens") and "two plus two?" in window.text("#question")
        assert "The same problem at other steps" in window.text("#others")
        assert window.run("return data.answers.filter(answer => answer.isLoaded).length") == 1
        window.press("down", "home")
        wait_for(window, "return document.querySelector('#shown h2').innerText === 'answer 2'")
        assert "number=2 export=answer.svg" in window.text("#others")
        window.run("$('search').value = 'FIVE='; filter()")
        wait_for(window, "return $('count').textContent === '20 of 40 answers'")
        wait_for(window, "return $('rows').innerText.includes('five=')")
        window.run("$('search').value = ''; filter(); $('list').scrollTop = 1e9")
        wait_for(window, "return $('rows').innerText.includes('five=') && $('rows').innerText.includes('40')")
        assert window.run("return document.querySelectorAll('img').length") == 0
    assert window.complaints() == []


def wait_for(window, script):
    ends = time.monotonic() + 30
    while not window.run(script):
        assert time.monotonic() < ends, script
        time.sleep(0.05)
