"""The page in a real browser, without a window: Chromium, driven by Playwright."""

from __future__ import annotations

import json
import re

import pytest
from support import new_engine, random_prompts, run_to_end

from common.sampling_params import SamplingParams
from common.trace import Trace
from dev.trace.page_file import page
from dev.trace.reader import read_trace
from dev.trace.screenshot import find_browser

HOSTILE = '</script><img src=x onerror="document.title=1"><b>&amp;'
SHARED = random_prompts(3, [24])[0]


def make_trace(path, milestone: str, num_requests: int = 12):
    """A run with waiting, preemption and, where there is one, a growing tree."""
    options = {"block_size": 8, "num_kv_blocks": 20} if milestone >= "m3" else {}
    engine = new_engine(milestone, max_model_len=96, **options)
    with Trace(path) as trace:
        trace.attach(engine)
        for i in range(num_requests):
            prompt = HOSTILE if i == 0 else [*SHARED[: 8 + 2 * i], i]
            params = SamplingParams(temperature=0.0, max_tokens=10 + 3 * i, ignore_eos=True)
            engine.add_request(str(i), prompt, params)
            engine.step()
        run_to_end(engine)
    return read_trace(path)


def long_trace(path, num_steps: int):
    """As many steps as a long bench has, made up: one request after the other."""
    header = {
        "folovllm_trace": 1, "milestone": "m3_paged", "model": {"name": "made up"},
        "layout": [16, 64], "prefix_counters": [],
        "config": {"device": "cpu", "dtype": "float32", "block_size": 16},
        "environment": {"gpu": None, "cpu": "CPU", "num_threads": 1, "torch": "2",
                        "date": "2026-01-01T00:00:00+00:00"},
    }  # fmt: skip
    lines: list[dict] = [header]
    for step in range(num_steps):
        request, place = divmod(step, 20)
        times = [1000 * step, 1000 * step + 10, None, 1000 * step + 900]
        record = {"step": step, "times": times, "read": [step, times[3] - 5], "running": 1,
                  "waiting": 0, "kv": [place + 1, 32]}  # fmt: skip
        if place == 0:
            lines.append({"request": request, "id": str(request), "sample": 0, "at": times[0],
                          "prompt_tokens": 4, "max_tokens": 20})  # fmt: skip
            record |= {"chunks": [[request, 0, 4, 1, None]], "admitted": [[request, 0]],
                       "tables": [[request, 0, [request % 64]]]}  # fmt: skip
        else:
            record["decode"] = [request] if place == 1 else "same"
        if place == 19:
            record["ended"] = [[request, "length", 20, times[3]]]
        lines.append(record)
    lines.append({"end": 1000 * num_steps, "steps": num_steps})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_trace(path)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("there is no Chromium or Chrome: apt-get install chromium, or BROWSER_PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    names = ("m1_basic", "m2_batching", "m3_paged", "m6_prefix")
    return {name: make_trace(folder / f"{name}.jsonl", name) for name in names}


@pytest.fixture
def show(browser, tmp_path):
    """``show(traces)`` opens the page; in the end nothing must have gone wrong in it."""
    contexts, wrong = [], []

    def open_page(*shown, width=1280, height=800, hash="", **options):
        file = tmp_path / "page.html"
        file.write_text(page(shown), encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: None if r.url.startswith("file:") else wrong.append(r.url))
        tab.goto(file.as_uri() + hash)
        tab.wait_for_function("document.querySelector('#readout').textContent !== ''")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def settle(tab) -> None:
    """Wait until what was asked for has been drawn."""
    tab.evaluate("() => new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")


def press(tab, *keys: str) -> None:
    for key in keys:
        tab.keyboard.press(key)
    settle(tab)


def step_of(tab) -> int:
    return int(re.match(r"step (\d+)", tab.inner_text("#readout"))[1])


def go_to(tab, frame: int) -> None:
    tab.evaluate(
        "frame => { const s = document.querySelector('#scrub'); s.value = frame;"
        " s.dispatchEvent(new Event('input')); }",
        frame,
    )
    settle(tab)


def numbers(tab, trace: int = 0) -> dict[str, str]:
    section = tab.locator(".numbers").nth(trace)
    names, values = section.locator("dt").all_inner_texts(), section.locator("dd").all_inner_texts()
    return dict(zip(names, (" ".join(value.split()) for value in values), strict=True))


# --- what it shows ------------------------------------------------------------------------------


@pytest.mark.parametrize("milestone", ["m1_basic", "m2_batching", "m3_paged", "m6_prefix"])
def test_numbers_are_those_of_the_trace(show, traces, milestone):
    trace = traces[milestone]
    tab = show(trace)
    for place in (0, len(trace.frames) // 2, 5, len(trace.frames) - 1):
        go_to(tab, place)
        shown, frame = numbers(tab), trace.frames[place]
        assert shown["Step"] == str("–" if frame.step is None else frame.step)
        assert shown["In the step"].split()[0] == str(frame.num_tokens)
        assert shown["Running"] == f"{frame.running} {frame.waiting} waiting"
        assert shown["KV slots used"].split()[0] == str(frame.kv_used)
        so_far = sum(f.num_sampled for f in trace.frames[: place + 1])
        assert shown["Tokens so far"].split()[0] == str(so_far)
        preempted = sum(len(f.preempted) for f in trace.frames[: place + 1])
        assert shown["Preemptions"] == str(preempted)
    assert preempted == (0 if milestone < "m3" else preempted) and (
        milestone < "m3" or preempted > 0
    )


def test_every_block_is_told_as_the_tables_have_it(show, traces):
    trace = traces["m6_prefix"]
    tab = show(trace)
    tables: dict[int, list[int]] = {}
    leaving: list[int] = []
    owners_at: list[dict[int, list[int]]] = []
    for frame in trace.frames:
        gone = [*leaving, *(e.request for e in frame.ended_before), *frame.preempted]
        for request in gone:
            tables.pop(request, None)
        for request, kept, blocks in frame.tables:
            tables[request] = tables.get(request, [])[:kept] + blocks
        leaving = [ending.request for ending in frame.ended]
        owners: dict[int, list[int]] = {}
        for request, table in sorted(tables.items()):
            for block in table:
                owners.setdefault(block, []).append(request)
        owners_at.append(owners)
    for place in (33, 8, 3, 20):  # there and back
        go_to(tab, place)
        tab.locator(".map canvas").focus()
        for block in range(20):
            settle(tab)
            told = tab.locator(".map ~ .told").inner_text()
            assert told.startswith(f"Block {block}: ")
            named = sorted(map(int, re.findall(r"request (\d+) ", told)))
            assert named == owners_at[place].get(block, [])
            tab.keyboard.press("ArrowRight")
        tab.evaluate("document.activeElement.blur()")
        assert step_of(tab) == trace.frames[place].step, "an arrow key in the map moved the step"


def test_the_tree_says_what_the_index_counted(show, traces):
    trace = traces["m6_prefix"]
    tab = show(trace)
    for place in (4, 30):
        go_to(tab, place)
        prefix = trace.frames[place].prefix
        told = tab.locator(".tree ~ .told").inner_text()
        assert f"{prefix['num_hits']} of {prefix['num_queries']} request" in told
        assert f"{prefix['num_blocks']} blocks in {prefix['num_nodes']} node" in told


def test_text_of_a_prompt_is_only_text(show, traces):
    tab = show(traces["m3_paged"])
    assert tab.title() == "m3_paged, step by step"
    assert HOSTILE in tab.locator(".batch button").first.inner_text()


def test_drawings_change_with_the_step(show, traces):
    tab = show(traces["m6_prefix"])
    seen = {".rows canvas": set(), ".lanes": set(), ".map canvas": set(), ".tree canvas": set(),
            ".clock": set()}  # fmt: skip
    for place in (2, 12, 30):
        go_to(tab, place)
        for selector, pictures in seen.items():
            pictures.add(tab.eval_on_selector(selector, "canvas => canvas.toDataURL()"))
    assert all(len(pictures) == 3 for pictures in seen.values())


# --- how it is used -----------------------------------------------------------------------------


def test_keys(show, traces):
    tab = show(traces["m6_prefix"])
    last = len(traces["m6_prefix"].frames) - 1
    press(tab, "ArrowRight", "ArrowRight", "ArrowRight")
    assert step_of(tab) == 3
    press(tab, "ArrowLeft")
    assert step_of(tab) == 2
    press(tab, "Shift+ArrowRight")
    assert step_of(tab) == 12
    press(tab, "End")
    assert tab.input_value("#scrub") == str(last)
    press(tab, "Home")
    assert step_of(tab) == 0
    press(tab, "]", "]")
    assert tab.input_value("#speed") == "32"
    press(tab, " ")
    tab.wait_for_function("Number(document.querySelector('#scrub').value) >= 2")
    assert tab.get_attribute("#play", "aria-label") == "Pause"
    press(tab, " ")
    assert tab.get_attribute("#play", "aria-label") == "Play"
    press(tab, "?")
    assert tab.locator("#help").is_visible()
    press(tab, "Escape")
    assert not tab.locator("#help").is_visible()
    press(tab, "s")
    assert tab.get_attribute("#by-time", "aria-pressed") == "true"
    assert "s" in tab.inner_text("#readout") and "step" not in tab.inner_text("#readout")


def test_playing_ends_at_the_end_and_begins_anew(show, traces):
    tab = show(traces["m1_basic"])
    last = len(traces["m1_basic"].frames) - 1
    go_to(tab, last - 2)
    tab.click("#play")
    tab.wait_for_function("document.querySelector('#play').ariaLabel === 'Play'")
    assert tab.input_value("#scrub") == str(last)
    tab.click("#play")
    tab.wait_for_function("Number(document.querySelector('#scrub').value) < 5")
    tab.click("#play")


def test_buttons_and_places_in_the_address(show, traces):
    tab = show(traces["m3_paged"], hash="#7,dark")
    assert step_of(tab) == 7
    assert tab.get_attribute("html", "data-theme") == "dark"
    for button, step in (("forward", 8), ("back", 7), ("first", 0)):
        tab.click(f"#{button}")
        settle(tab)
        assert step_of(tab) == step
    tab.click(".lanes", position={"x": 640, "y": 20})
    settle(tab)
    assert step_of(tab) > 3
    tab.click(".batch button >> nth=0")
    assert tab.locator(".batch button[aria-pressed=true]").count() == 1
    press(tab, "Escape")
    assert tab.locator(".batch button[aria-pressed=true]").count() == 0


def test_two_traces_go_together(show, traces):
    shown = [traces["m3_paged"], traces["m6_prefix"]]
    tab = show(*shown)
    assert tab.locator(".trace").count() == 2
    go_to(tab, 21)
    assert [numbers(tab, i)["Step"] for i in (0, 1)] == ["21", "21"]
    tab.click("#by-time")
    settle(tab)
    for place in (10, 40, 90):
        go_to(tab, place)
        starts = sorted(
            {frame.start - trace.frames[0].start for trace in shown for frame in trace.frames}
        )
        for i, trace in enumerate(shown):
            begin = trace.frames[0].start
            due = [f for f in trace.frames if f.start - begin <= starts[place]][-1]
            assert numbers(tab, i)["Step"] == str("–" if due.step is None else due.step)


def test_one_who_listens_is_told(show, traces):
    trace = traces["m6_prefix"]
    tab = show(trace)
    press(tab, "ArrowRight", "ArrowRight")
    tab.wait_for_function("document.querySelector('#live').textContent.startsWith('step 2 of')")
    assert "request 2 computes prompt tokens" in tab.inner_text("#live")
    tab.click("summary")
    tab.wait_for_selector("tbody tr")
    rows = tab.locator("tbody tr").all_inner_texts()
    assert len(rows) == trace.frames[2].running + trace.frames[2].waiting
    unnamed = tab.evaluate(
        "() => [...document.querySelectorAll('button, input, select, canvas[tabindex]')]"
        ".filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length"
    )
    assert unnamed == 0
    assert tab.get_attribute("html", "lang") == "en"


# --- how it looks -------------------------------------------------------------------------------

CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest("script, option")) continue;
    let under = element, color;
    do {
      color = parse(getComputedStyle(under).backgroundColor);
      under = under.parentElement;
    } while (color.length === 4 && color[3] === 0 && under);
    const [a, b] = [luminance(parse(getComputedStyle(element).color)), luminance(color)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([element.className || element.tagName, element.textContent.slice(0, 20), ratio]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_themes(show, traces, scheme):
    tab = show(traces["m6_prefix"], color_scheme=scheme)
    assert tab.get_attribute("html", "data-theme") == scheme
    go_to(tab, 14)
    tab.click("summary")
    found = tab.evaluate(CONTRASTS)
    assert len(found) > 60
    assert [each for each in found if each[2] < 4.5] == []
    assert len({name for name, _, _ in found if name == "badge"}) == 1
    tab.click("#theme")
    assert tab.get_attribute("html", "data-theme") != scheme


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_nothing_sticks_out(show, traces, width):
    shown = [traces["m3_paged"], traces["m6_prefix"]]
    for names in (shown[1:], shown):
        tab = show(*names, width=width)
        go_to(tab, 14)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        wide = tab.evaluate(
            "() => [...document.querySelectorAll('.card, .numbers div, .transport, .top')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className)"
        )
        assert wide == []


def test_who_wants_little_motion_gets_little(show, traces):
    for motion, duration in (("reduce", "0s"), ("no-preference", "0.12s")):
        tab = show(traces["m3_paged"], reduced_motion=motion)
        style = "e => getComputedStyle(e).transitionDuration"
        assert tab.eval_on_selector(".budget i", style) == duration
        assert step_of(tab) == 0  # and nothing plays by itself


def test_thousands_of_steps_stay_a_small_page(show, tmp_path):
    """What is in the document and what is drawn depends on the window, not on the trace."""
    tab = show(long_trace(tmp_path / "long.jsonl", 5000))
    sizes = []
    for place in (0, 2500, 4999, 60):
        go_to(tab, place)
        assert step_of(tab) == place
        assert numbers(tab)["Tokens so far"].split()[0] == f"{place + 1:,}"
        sizes.append(tab.evaluate("document.querySelectorAll('*').length"))
    assert max(sizes) < 500
    assert tab.eval_on_selector(".rows canvas", "c => c.height") < 500
    calls = """() => {
      let count = 0;
      const proto = CanvasRenderingContext2D.prototype;
      for (const name of ["fillRect", "fill", "fillText"]) {
        const real = proto[name];
        proto[name] = function (...args) { count++; return real.apply(this, args); };
      }
      document.querySelector("#forward").click();
      return new Promise((done) => requestAnimationFrame(() =>
        requestAnimationFrame(() => done(count))));
    }"""
    assert 100 < tab.evaluate(calls) < 6000


def test_a_trace_without_steps_is_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    with Trace(path) as trace:
        trace.attach(new_engine("m3_paged"))
    with pytest.raises(ValueError, match="has no steps"):
        page([read_trace(path)])
