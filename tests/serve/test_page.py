"""The page of a service in a real browser: what it shows at a click, and what it never does."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from . import served
from .served import Running, saved, serving

sync_api = pytest.importorskip("playwright.sync_api")

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")

IMAGE = "<img src=x onerror=\"document.title='broken'\">"
HOSTILE = [IMAGE, "</script><b>bold</b><script>document.title='broken'</script>", "good"]
KINDS = ("classify", "several", "score", "tag", "answer", "choose", "embed", "pretrained")

# The least contrast of any text with what is behind it, and the text.
CONTRAST = """() => {
  const context = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  function light(...colours) {
    context.clearRect(0, 0, 1, 1);
    for (const one of colours) { context.fillStyle = one; context.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map(one => one / 255)
      .map(one => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  let least = [99, ''];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const box = texts.currentNode.parentElement, said = texts.currentNode.data.trim();
    if (!said || !box.checkVisibility() || box.closest('script')) continue;
    const behind = [];
    for (let one = box; one; one = one.parentElement)
      behind.unshift(getComputedStyle(one).backgroundColor);
    const [a, b] = [light(...behind), light(...behind, getComputedStyle(box).color)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, said];
  }
  return least;
}"""
# Where marks stand: text, and first and last code point of the text around them.
MARKS = """line => [...line.querySelectorAll('mark')].map(mark => {
  const range = document.createRange();
  range.setStart(line, 0);
  range.setEndBefore(mark);
  const start = Array.from(range.toString()).length;
  return [mark.textContent, start, start + Array.from(mark.textContent).length];
})"""


class Tab:
    """The page of a service, and what a browser noted of it."""

    def __init__(self, context: Any, running: Running) -> None:
        self.running = running
        self.address = "http://{}:{}".format(*running.address)
        self.page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.noted: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.noted.append(f"error: {error}"))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.answer = self.page.goto(self.address)

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.noted.append(f"{message.type}: {message.text}")

    def of(self, selector: str) -> Any:
        """What is on the tab that is open."""
        return self.page.locator(f".panel:not([hidden]) {selector}")

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def open(self, title: str) -> None:
        self.page.get_by_role("tab", name=title).click()

    def write(self, name: str, text: str) -> None:
        self.of(f"label :is(input, textarea)[data-name='{name}']").fill(text)

    def run(self) -> str:
        """Clicks, and returns the line that says what came of it."""
        self.of(".run").click()
        return self.told()

    def told(self) -> str:
        self.of("[aria-busy=true]").wait_for(state="detached")
        return str(self.of(".said").inner_text()).strip()

    def rows(self, within: str = ".bars") -> list[tuple[str, str]]:
        """Names and percentages of the bars that are seen, after a look at their widths."""
        found = []
        for one in self.of(f"{within} li:visible").all():
            share = one.locator(".percent").inner_text()
            bar = one.locator(".bar").evaluate(
                "bar => parseFloat(getComputedStyle(bar, '::before').width) / bar.clientWidth"
            )
            if not share.startswith("<"):
                assert abs(100 * bar - float(share[:-1])) < 1.5
            found.append((one.locator(".name").text_content(), share))
        return found

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Running]]:
    """A service of each kind, begun when it is first asked for."""
    folder = tmp_path_factory.mktemp("models")
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        many = served.names([f"label {n}" for n in range(23)])
        patch.setitem(served.HEADS, "many", ("ForSequenceClassification", many))
        hostile = ("ForSequenceClassification", served.names(HOSTILE))
        patch.setitem(served.HEADS, "hostile", hostile)
        begun: dict[str, Running] = {}

        def service(kind: str) -> Running:
            if kind not in begun:
                begun[kind] = stack.enter_context(serving(saved(folder, kind)))
            return begun[kind]

        yield service


@pytest.fixture
def visit(browser: Any, services: Callable[[str], Running]) -> Iterator[Callable[..., Tab]]:
    """Opens a page; at the end, it must have asked nobody else and have noted nothing."""
    tabs: list[Tab] = []
    with ExitStack() as stack:

        def visit(kind: str | Running, **options: Any) -> Tab:
            context = stack.enter_context(browser.new_context(**options))
            tabs.append(Tab(context, services(kind) if isinstance(kind, str) else kind))
            return tabs[-1]

        yield visit
    for tab in tabs:
        assert all(one.startswith((tab.address, "data:")) for one in tab.asked), tab.asked
        failed = "error: Failed to load resource"  # an answer that is none: the page tells it
        assert [one for one in tab.noted if not one.startswith(failed)] == []


def percent(share: float) -> str:
    return f"{100 * share:.1f}%" if not 0 < share < 0.0005 else "<0.1%"


def test_labels_have_bars_the_likeliest_first(visit: Callable[..., Tab]) -> None:
    tab = visit("classify")
    tab.write("text", served.TEXT)
    said = tab.run()
    one = tab.running.right("/predict", {"inputs": served.TEXT})["predictions"][0]
    order = sorted(one["probabilities"].items(), key=lambda item: -item[1])
    assert tab.rows() == [(name, percent(share)) for name, share in order]
    assert tab.of(".bars .chosen .name").all_inner_texts() == [one["label"]]
    assert said.startswith(f"{one['label']}, {percent(one['score'])} · ")
    assert said.endswith(" ms") and " tokens · " in said
    tab.write("text_pair", "a cat")
    tab.run()
    pair = {"text": served.TEXT, "text_pair": "a cat"}
    two = tab.running.right("/predict", {"inputs": pair})["predictions"][0]
    assert dict(tab.rows()) == {name: percent(p) for name, p in two["probabilities"].items()}
    assert two["probabilities"] != one["probabilities"]


def test_of_many_labels_the_first_are_shown_and_the_rest_at_a_click(
    visit: Callable[..., Tab],
) -> None:
    tab = visit("many")
    tab.write("text", "a cat")
    tab.run()
    assert len(tab.rows()) == 20
    tab.click("… 3 more")
    assert sorted(name for name, _ in tab.rows()) == sorted(f"label {n}" for n in range(23))


def test_several_labels_and_a_score(visit: Callable[..., Tab]) -> None:
    tab = visit("several")
    tab.write("text", "a cat")
    said = tab.run()
    one = tab.running.right("/predict", {"inputs": "a cat"})["predictions"][0]
    assert dict(tab.rows()) == {name: percent(p) for name, p in one["probabilities"].items()}
    assert sorted(tab.of(".bars .chosen .name").all_inner_texts()) == sorted(one["labels"])
    assert said.startswith(", ".join(one["labels"]) or "none of the labels")
    tab = visit("score")
    tab.write("text", "a cat")
    tab.run()
    score = tab.running.right("/predict", {"inputs": "a cat"})["predictions"][0]["score"]
    assert abs(float(tab.of(".large").inner_text()) - score) < 1e-3


def test_entities_are_marked_where_they_stand(visit: Callable[..., Tab]) -> None:
    tab = visit("tag")
    text = "🎉👩‍🚀 friend Ada a the London wrote\n🎈 the engines. London engines her Lovelace"
    tab.write("text", text)
    tab.run()
    found = tab.running.right("/predict", {"inputs": text})["predictions"][0]["entities"]
    assert len(found) > 1 and any(one["start"] > 5 for one in found)
    assert tab.of(".text").text_content() == text
    marks = tab.of(".text").evaluate(MARKS)
    assert marks == [[text[e["start"] : e["end"]], e["start"], e["end"]] for e in found]
    tip = tab.page.get_by_role("tooltip")
    assert not tip.is_visible()
    tab.of("mark").nth(1).hover()
    assert f"{found[1]['type']} {percent(found[1]['score'])}" in tip.inner_text()
    tab.page.mouse.move(0, 0)
    assert not tip.is_visible()
    tab.of("mark").nth(0).focus()
    assert percent(found[0]["score"]) in tip.inner_text()
    tab.page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_each_type_of_entity_has_its_colour(visit: Callable[..., Tab]) -> None:
    tab = visit("tag")
    names = ["person", "place", "person", *(f"thing {n}" for n in range(9))]
    entities = [
        {"type": name, "text": "a", "start": 2 * n, "end": 2 * n + 1, "score": 0.5}
        for n, name in enumerate(names)
    ]
    given = {"predictions": [{"entities": entities}], "tokens": 9, "truncated": 0}
    tab.page.route("**/predict", lambda route: route.fulfill(json=given))
    tab.write("text", "a " * len(names))
    assert tab.run().startswith("12 entities")
    assert tab.of(".types li").all_inner_texts()[:3] == ["person 2", "place 1", "thing 0 1"]
    colours = [
        one.evaluate("mark => getComputedStyle(mark).backgroundColor")
        for one in tab.of("mark").all()
    ]
    assert colours[0] == colours[2] and len(set(colours)) == 11


def test_an_answer_is_marked_in_its_paragraph(visit: Callable[..., Tab]) -> None:
    tab = visit("answer")
    context = f"🎉 {served.TEXT}. 🎈 {served.TEXT}"
    tab.write("question", "who wrote")
    tab.write("context", context)
    tab.page.get_by_label("Question").press("Enter")
    said = tab.told()
    body = {"inputs": {"question": "who wrote", "context": context}}
    one = tab.running.right("/predict", body)["predictions"][0]
    assert one["answer"] and one["start"] > 1
    assert tab.of(".text").evaluate(MARKS) == [[one["answer"], one["start"], one["end"]]]
    assert tab.of(".text").text_content() == context
    assert percent(one["score"]) in dict(tab.rows()).values()
    assert said.startswith(f"“{one['answer']}”, {percent(one['score'])}")
    none = {"answer": "", "start": 0, "end": 0, "score": 0.75, "no_answer": 0.75}
    given = {"predictions": [none], "tokens": 9, "truncated": 1}
    tab.page.route("**/predict", lambda route: route.fulfill(json=given))
    said = tab.run()
    assert said.startswith("no answer, 75.0% · 9 tokens") and said.endswith(
        "cut: too long to be read whole"
    )
    assert tab.of("mark").count() == 0
    assert tab.rows() == [("no answer in the paragraph", "75.0%")]


def test_choices_are_added_removed_and_compared(visit: Callable[..., Tab]) -> None:
    tab = visit("choose")
    tab.write("question", "who wrote")
    for number, text in enumerate(["a cat", "a mat", "ada"], 1):
        if number == 3:
            tab.click("Add a choice")
        tab.page.get_by_label(f"Choice {number}", exact=True).fill(text)
    tab.click("Remove choice 2")
    tab.write("context", served.TEXT)
    said = tab.run()
    inputs = {"question": "who wrote", "context": served.TEXT, "choices": ["a cat", "ada"]}
    one = tab.running.right("/predict", {"inputs": inputs})["predictions"][0]
    assert dict(tab.rows()) == dict(
        zip(inputs["choices"], map(percent, one["probabilities"]), strict=True)
    )
    assert said.startswith(f"choice {one['choice'] + 1}, {percent(one['score'])}")
    assert tab.of(".bars .chosen .name").inner_text() == inputs["choices"][one["choice"]]


def test_a_candidate_takes_the_place_of_its_mask(visit: Callable[..., Tab]) -> None:
    tab = visit("pretrained")
    field = tab.of("textarea")
    field.fill("the  sat on a")
    field.evaluate("field => field.setSelectionRange(4, 4)")
    tab.click("Insert [MASK]")
    assert field.input_value() == "the [MASK] sat on a"
    field.press("End")
    tab.click("Insert [MASK]")
    text = field.input_value()
    assert text == "the [MASK] sat on a [MASK]"
    tab.run()
    masks = tab.running.right("/fill-mask", {"inputs": text})["predictions"][0]["masks"]
    for number, guesses in enumerate(masks, 1):
        wanted = [(one["token_str"], percent(one["score"])) for one in guesses]
        assert tab.rows(f"[aria-label='Mask {number}']") == wanted

    def candidate(mask: int, place: int) -> str:
        button = tab.of(f"[aria-label='Mask {mask + 1}'] li button").nth(place)
        button.click()
        assert tab.of(".text").text_content() == field.input_value()
        return str(masks[mask][place]["token_str"])

    def filled(*words: str) -> str:
        a, b = (one[2:] if one.startswith("##") else f" {one}" for one in words)
        return f"the{a} sat on a{b}"

    second = candidate(1, 1)
    assert field.input_value() == filled("[MASK]", second)
    first = candidate(0, 2)
    assert field.input_value() == filled(first, second)
    first = candidate(0, 0)
    assert field.input_value() == filled(first, second)
    assert tab.of("[aria-pressed=true] .name").all_inner_texts() == [first, second]
    candidate(0, 0)  # once more: it is taken out again
    assert field.input_value() == filled("[MASK]", second)
    field.fill("something else")
    tab.of("[aria-label='Mask 1'] li button").nth(0).click()
    assert field.input_value() == "something else"
    assert tab.of(".text").text_content() == filled(first, second)


def test_a_piece_of_a_word_joins_what_is_before(visit: Callable[..., Tab]) -> None:
    tab = visit("pretrained")
    masks = [[{"token_str": "##s", "token": 9, "score": 0.5}]]
    given = {"predictions": [{"masks": masks}], "tokens": 5, "truncated": 0}
    tab.page.route("**/fill-mask", lambda route: route.fulfill(json=given))
    tab.of("textarea").fill("two cat [MASK] sat")
    tab.run()
    tab.of("li button").click()
    assert tab.of("textarea").input_value() == "two cats sat"


def test_similarities_of_texts(visit: Callable[..., Tab]) -> None:
    tab = visit("embed")
    texts = ["the cat sat", "ada wrote to london", "the cat sat on a mat"]
    tab.click("Add a text")
    for number, text in enumerate(texts, 1):
        tab.page.get_by_label(f"Text {number}", exact=True).fill(text)
    said = tab.run()
    body = {"inputs": texts, "normalize": True}
    units = tab.running.right("/embed", body)["embeddings"]
    shown = [float(one) for one in tab.of("tbody td").all_inner_texts()]
    wanted = [sum(a * b for a, b in zip(x, y, strict=True)) for x in units for y in units]
    assert shown == pytest.approx(wanted, abs=6e-4)
    assert said.startswith("3 vectors of 32")
    assert tab.of("tbody th").all_inner_texts() == [f"{n} {t}" for n, t in enumerate(texts, 1)]


def test_tabs_by_mouse_and_by_keyboard(visit: Callable[..., Tab]) -> None:
    tab = visit("pretrained")
    tabs = tab.page.get_by_role("tab")
    assert tabs.all_inner_texts() == ["Fill mask", "Embed"]
    tab.open("Embed")
    assert tab.page.get_by_role("tabpanel").get_by_label("Text 1", exact=True).is_visible()
    tabs.nth(1).press("ArrowRight")
    assert tabs.nth(0).get_attribute("aria-selected") == "true"
    tab.of("textarea").fill("a [MASK]")
    tab.of("textarea").press("Control+Enter")
    assert tab.told().endswith(" ms")
    alone = visit("embed")
    assert alone.page.get_by_role("tab").count() == 0


def test_markup_in_texts_and_labels_stays_text(visit: Callable[..., Tab]) -> None:
    tab = visit("hostile")
    assert IMAGE in tab.page.locator("header p").inner_text()
    tab.write("text", IMAGE + "</textarea>")
    said = tab.run()
    assert sorted(name for name, _ in tab.rows()) == sorted(HOSTILE)
    assert any(said.startswith(label) for label in HOSTILE)
    for kind, fields in (("tag", ["text"]), ("answer", ["question", "context"])):
        other = visit(kind)
        for field in fields:
            other.write(field, IMAGE)
        other.run()
        assert other.of(".text").text_content() == IMAGE
        assert other.page.locator("img").count() == 0
    assert tab.page.locator("img, b").count() == 0
    assert tab.page.title() == f"{tab.running.service.served.name}: fastbert"


def test_the_policy_lets_nothing_else_run(visit: Callable[..., Tab]) -> None:
    tab = visit("embed")
    policy = tab.answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert tab.answer.headers["referrer-policy"] == "no-referrer"
    tab.page.evaluate("""() => {
      const script = document.createElement('script');
      try { script.textContent = "document.title = 'broken'"; } catch { }
      document.body.append(script);
      try { document.body.innerHTML = '<b>'; } catch { }
      try { document.body.setAttribute('onclick', "document.title = 'broken'"); } catch { }
    }""")
    tab.page.locator("body").click()
    refused = tab.page.evaluate("fetch('http://127.0.0.2:9/').catch(() => 'refused')")
    assert refused == "refused"
    assert tab.page.title() != "broken" and tab.page.locator("b").count() == 0
    assert tab.noted and "127.0.0.2" not in str(tab.asked)
    tab.noted.clear()


def test_errors_are_told_in_a_line(visit: Callable[..., Tab]) -> None:
    tab = visit("choose")
    tab.of(".example").click()
    tab.page.get_by_label("Choice 2", exact=True).fill(" ")
    assert tab.run() == "inputs.choices[1]: is empty"
    assert tab.of("[aria-invalid] >> nth=0").input_value() == " "
    tab.page.get_by_label("Choice 2", exact=True).fill("ada")
    assert tab.run().endswith(" ms")
    assert tab.of("[aria-invalid]").count() == 0
    tab = visit("classify")
    assert tab.run() == "inputs: is empty"
    assert tab.of(".result").inner_text() == ""
    assert visit("pretrained").run() == "inputs: holds no [MASK]"
    tab.write("text", "ada")
    tab.page.context.set_offline(True)
    assert tab.run().startswith("the service cannot be reached")
    tab.page.context.set_offline(False)
    tab.page.route("**/predict", lambda route: route.fulfill(status=502, body="<b>Bad gateway"))
    assert tab.run() == "the service answered with status 502"


def test_too_many_requests_are_asked_to_wait(visit: Callable[..., Tab], tmp_path: Path) -> None:
    with serving(saved(tmp_path, "classify"), max_requests=1) as running:
        tab = visit(running)
        tab.write("text", "ada")
        running.service.in_flight += 1
        said = tab.run()
        running.service.in_flight -= 1
        assert said == ("too many requests: wait 1 second, then run it again (2 requests at once)")
        assert tab.run().endswith(" ms")


def test_a_token_is_asked_for_where_one_is_needed(
    visit: Callable[..., Tab], tmp_path: Path
) -> None:
    assert not visit("classify").page.get_by_label("Bearer token").is_visible()
    with serving(saved(tmp_path, "classify"), ["s3cret"]) as running:
        tab = visit(running)
        field = tab.page.get_by_label("Bearer token")
        assert field.get_attribute("type") == "password"
        tab.write("text", "ada")
        assert tab.run() == "a bearer token is needed"
        assert field.evaluate("field => field === document.activeElement")
        field.fill("s3cr€t")
        assert tab.run() == "the token holds what no header can"
        field.fill("s3cret")
        assert tab.run().endswith(" ms")
        assert "s3cret" not in tab.of(".curl").inner_text()
        assert "Bearer $TOKEN" in tab.of(".curl").inner_text()
        assert tab.page.evaluate("localStorage.length + sessionStorage.length") == 0
        assert tab.page.context.cookies() == []
        with tab.page.expect_popup() as popup:
            tab.page.get_by_role("link", name="/metrics").click()
        assert "fastbert_requests" in popup.value.locator("pre").inner_text()


def test_a_later_question_is_the_one_that_is_answered(visit: Callable[..., Tab]) -> None:
    tab = visit("classify")
    held: list[Any] = []
    tab.page.route("**/predict", lambda route: route.continue_() if held else held.append(route))
    gone: list[str] = []
    tab.page.on("requestfailed", lambda request: gone.append(request.post_data))
    tab.write("text", "ada")
    tab.of(".run").click()
    button = tab.of(".run")
    assert button.is_disabled() and button.inner_text() == "Running …"
    assert tab.of(".said").inner_text().strip() == "Running …"
    tab.write("text", served.TEXT)
    tab.page.keyboard.press("Control+Enter")
    said = tab.told()
    assert [json.loads(one)["inputs"] for one in gone] == ["ada"]
    assert button.is_enabled() and button.inner_text() == "Run"
    tokens = tab.running.right("/predict", {"inputs": served.TEXT})["tokens"]
    assert f" · {tokens} tokens · " in said


def test_the_request_is_shown_as_curl(visit: Callable[..., Tab]) -> None:
    tab = visit("classify", permissions=["clipboard-read", "clipboard-write"])
    text = 'it\'s "ada" $HOME `ls`\n\\ 🎉'
    tab.write("text", text)
    tab.run()
    line = tab.of(".curl code").text_content()
    command, address, *_, body = shlex.split(line)
    assert (command, address) == ("curl", f"{tab.address}/predict")
    assert json.loads(body) == {"inputs": text}
    tab.click("Copy")
    tab.page.get_by_role("button", name="Copied").wait_for()
    assert tab.page.evaluate("navigator.clipboard.readText()") == line


@pytest.mark.parametrize("kind", KINDS)
def test_its_example_can_be_read_in_light_and_dark_wide_and_narrow(
    visit: Callable[..., Tab], kind: str
) -> None:
    tab = visit(kind, viewport={"width": 1400, "height": 900})
    for scheme, paper in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(22, 25, 30)")):
        tab.page.emulate_media(color_scheme=scheme)
        behind = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert behind == paper
        tab.of(".example").click()
        assert tab.run().endswith(" ms")
        contrast, text = tab.page.evaluate(CONTRAST)
        assert 4.5 <= contrast < 99, text
        assert tab.fits()
    tab.page.set_viewport_size({"width": 320, "height": 700})
    assert tab.fits()
    for field in tab.of(":is(textarea, input)").all():
        field.fill("W" * 26 + tab.running.service.served.mask_token)
    assert " ms" in tab.run()
    assert tab.fits()


def test_the_foot_tells_what_is_served(visit: Callable[..., Tab]) -> None:
    tab = visit("classify")
    foot = tab.page.locator("footer").inner_text()
    info = tab.running.ask("/info")[1]
    for name in ("model", "task", "device", "dtype", "version"):
        assert info[name] in foot
    for name in ("openapi.json", "metrics", "health"):
        link = tab.page.get_by_role("link", name=f"/{name}")
        assert tab.running.ask(f"/{link.get_attribute('href')}")[0] == 200
