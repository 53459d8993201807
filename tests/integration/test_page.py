"""The page in a real browser: ask by file, drop, microphone, part and hit; see, hear and narrow what comes back."""

import base64
import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import HOW_TO_GET, find_browser
from playwright.sync_api import Browser, Page, Route, ViewportSize, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from serving import as_file, make_corpus, make_encoder, publish_release, running_service, sound

CHROMIUM = find_browser()
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)
PATIENCE_MS = 60_000
PICTURES = os.environ.get("AUDIOMAE_PICTURES")  # a folder for screenshots

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: {HOW_TO_GET}")


@dataclass(frozen=True)
class Site:
    """Where the page is, and the corpus behind it."""

    url: str
    corpus: Path


@pytest.fixture(scope="module")
def site(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    work = tmp_path_factory.mktemp("page")
    corpus = make_corpus(work / "corpus")
    publish_release(work / "index", corpus, make_encoder(), work / "staging")
    with running_service(work / "index") as http:
        yield Site(str(http.base_url), corpus)


@pytest.fixture(scope="module")
def browser(site: Site) -> Iterator[Browser]:
    microphone = site.corpus / "microphone.wav"
    microphone.write_bytes(as_file(sound("chirp", 1, seconds=10)))
    flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """The page, loaded; at the end it must have raised nothing and asked nobody but its own service."""
    context = browser.new_context(permissions=["microphone"], reduced_motion="reduce")
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page = context.new_page()
    errors: list[str] = []
    strangers: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: strangers.append(request.url))
    page.goto(site.url)
    expect(page.locator("#release")).to_contain_text("12 sounds")
    yield page
    context.close()
    assert errors == []
    assert [url for url in strangers if not url.startswith((site.url, "data:", "blob:"))] == []


def choose(page: Page, site: Site, uri: str) -> None:
    """Ask with a file of the corpus and wait for what was found."""
    page.locator("#file").set_input_files(site.corpus / uri)
    expect(page.locator("#status")).to_contain_text(f"sounds like {Path(uri).name}")


def names(page: Page) -> list[str]:
    """The uris of the sounds shown."""
    return page.locator(".sound .name").all_text_contents()


def is_playing(page: Page) -> None:
    """Wait until the one player has moved on."""
    page.wait_for_function("Number(document.getElementById('seek').value) > 0.05")


def lit(page: Page, canvas: str) -> int:
    """How many different bytes a canvas shows: an empty one has one or two."""
    script = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    return int(page.locator(canvas).first.evaluate(script))


def test_the_first_screen_says_what_it_is_and_offers_sounds(page: Page) -> None:
    expect(page.locator("#pitch")).to_be_visible()
    expect(page.locator(".sound")).to_have_count(6)
    expect(page.locator("#words")).to_be_hidden()  # this release cannot be searched in words
    page.wait_for_function("document.querySelector('.sound').peaks !== undefined")
    assert lit(page, ".sound .peaks") > 5
    page.locator(".sound .listen").first.click()
    is_playing(page)
    page.locator(".sound .similar").first.click()
    expect(page.locator("#status")).to_contain_text("sounds like")
    expect(page.locator("#pitch")).to_be_hidden()


def test_a_chosen_file_finds_itself_and_is_drawn(page: Page, site: Site) -> None:
    choose(page, site, "tone/1.wav")
    assert names(page)[0] == "tone/1.wav" and len(names(page)) == 12
    assert lit(page, "#spectrogram") > 50 and lit(page, "#wave") > 5
    page.wait_for_function("document.querySelector('.sound').peaks !== undefined")
    page.locator(".sound .listen").nth(1).click()
    is_playing(page)
    expect(page.locator("#now-name")).to_have_text(names(page)[1])


def test_a_part_of_the_sound_is_searched_alone(page: Page, site: Site) -> None:
    choose(page, site, "clicks/0.wav")
    page.locator("#scope").scroll_into_view_if_needed()
    box = page.locator("#scope").bounding_box()
    assert box is not None
    with page.expect_response(lambda response: response.url.endswith("/search")) as answered:
        page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 30)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 30, steps=5)
        page.mouse.up()
    files, part = {"file": (site.corpus / "clicks/0.wav").read_bytes()}, {"start_s": "0.5", "end_s": "1.5"}
    scores = [hit["score"] for hit in answered.value.json()["results"]]
    for given, same in ((part, True), ({}, False)):
        direct = httpx.post(f"{site.url}/search", files=files, data={"k": "20", **given}, timeout=PATIENCE_MS / 1000)
        expected = [hit["score"] for hit in direct.json()["results"]]
        assert (scores == pytest.approx(expected, abs=2e-3)) is same
    expect(page.locator("#query-region")).to_have_text(re.compile(r"0\.5 s to 1\.5 s"))
    assert "from=0.5" in page.url
    page.locator("#whole").click()
    expect(page.locator("#query-region")).to_have_text("2.0 s")
    page.go_back()
    expect(page.locator("#query-region")).to_have_text(re.compile(r"0\.5 s to 1\.5 s"))


def test_more_like_this_leaves_the_sound_out_and_back_returns(page: Page, site: Site) -> None:
    choose(page, site, "noise/1.wav")
    before = names(page)
    page.locator(".sound .similar").first.click()
    expect(page.locator("#status")).to_contain_text("like noise/1.wav in")
    expect(page.locator(".sound")).to_have_count(11)
    assert "noise/1.wav" not in names(page) and "item=" in page.url
    page.go_back()
    expect(page.locator("#status")).to_contain_text("sounds like 1.wav")
    expect(page.locator(".sound")).to_have_count(12)
    assert names(page) == before
    page.reload()  # the address says it all, the browser keeps the sound
    expect(page.locator("#status")).to_contain_text("sounds like 1.wav")
    assert names(page) == before


def test_filters_come_from_the_columns_with_counts(page: Page, site: Site) -> None:
    choose(page, site, "clicks/0.wav")
    labels = page.get_by_role("group", name="label")
    expect(labels.get_by_label("tone 3")).to_be_visible()
    labels.get_by_label("tone 3").check()
    expect(page.locator(".sound")).to_have_count(3)
    page.get_by_role("group", name="label").get_by_label("noise 3").check()
    expect(page.locator(".sound")).to_have_count(6)
    assert {name.partition("/")[0] for name in names(page)} == {"tone", "noise"}
    page.locator("#chips .chip").first.click()
    expect(page.locator(".sound")).to_have_count(12)
    page.locator(".sound", has_text="tone/0.wav").get_by_text("label: tone").click()
    expect(page.locator(".sound")).to_have_count(3)


def test_sounds_can_be_browsed_without_asking(page: Page) -> None:
    page.get_by_role("group", name="label").get_by_label("chirp 3").check()
    expect(page.locator("#status")).to_contain_text("3 sounds")
    assert {name.partition("/")[0] for name in names(page)} == {"chirp"}


def test_examples_steer_the_search(page: Page, site: Site) -> None:
    choose(page, site, "tone/1.wav")
    page.locator(".sound", has_text="chirp/2.wav").locator(".plus").click()
    expect(page.locator("#examples-row .chip")).to_have_text(["+ chirp/2.wav ✕"])
    expect(page.locator(".sound").first).to_be_visible()
    page.locator(".sound", has_text="noise/0.wav").locator(".minus").click()
    expect(page.locator("#examples-row .chip")).to_have_count(2)
    assert "plus=" in page.url and "minus=" in page.url
    page.locator("#examples-row .minus-chip").click()
    expect(page.locator("#examples-row .chip")).to_have_count(1)


def test_the_map_shows_every_file_and_filters_by_area(page: Page, site: Site) -> None:
    page.locator("#view-map").click()
    expect(page.locator("#map-legend li")).to_have_text(["chirp", "clicks", "noise", "tone"])
    page.wait_for_function("document.getElementById('map-canvas').width > 300")
    assert "view=map" in page.url and lit(page, "#map-canvas") > 8
    page.locator("#map-canvas").scroll_into_view_if_needed()
    box = page.locator("#map-canvas").bounding_box()
    assert box is not None
    page.locator("#map-brush").click()
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2, steps=4)
    page.mouse.up()
    expect(page.locator("#status")).to_contain_text("12 sounds")
    assert "area=" in page.url
    page.locator("#map-reset").click()
    page.locator("#map-canvas").focus()
    for _ in range(3):
        page.keyboard.press("-")
    page.keyboard.press("Enter")
    page.locator("#map-column").select_option("take")
    expect(page.locator("#map-legend li")).to_have_count(3)


def test_everything_can_be_done_from_the_keyboard(page: Page, site: Site) -> None:
    choose(page, site, "tone/0.wav")
    page.locator("#status").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".sound.current .name")).to_have_text(names(page)[1])
    page.keyboard.press("Space")
    is_playing(page)
    page.keyboard.press("+")
    expect(page.locator("#examples-row .chip")).to_have_count(1)
    expect(page.locator("#status")).to_contain_text("11 sounds like")  # the example itself is no answer
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    expect(page.locator(".sound").nth(1)).to_be_visible()
    page.keyboard.press("ArrowDown")
    wanted = page.locator(".sound.current .name").text_content()
    page.keyboard.press("m")
    expect(page.locator("#status")).to_contain_text(f"like {wanted} in")
    page.keyboard.press("Escape")
    expect(page.locator("#pitch")).to_be_visible()
    page.keyboard.press("/")
    expect(page.locator("#file")).to_be_focused()


def test_a_dropped_file_finds_itself(page: Page, site: Site) -> None:
    data = base64.b64encode((site.corpus / "chirp/2.wav").read_bytes()).decode()
    transfer = page.evaluate_handle(
        """data => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.wav"));
            return transfer;
        }""",
        data,
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#veil")).to_be_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.locator("#status")).to_contain_text("sounds like dropped.wav")
    expect(page.locator("#veil")).to_be_hidden()
    assert names(page)[0] == "chirp/2.wav"


def test_the_microphone_is_heard(page: Page) -> None:
    page.locator("#record").click()
    expect(page.locator("#record")).to_contain_text("(2 s)")
    assert page.locator("#level").evaluate("meter => meter.value") > 0
    page.locator("#record").click()
    expect(page.locator("#status")).to_contain_text("sounds like recording")
    assert len(names(page)) == 12
    expect(page.locator("#record")).to_have_text(re.compile("Record"))


def test_what_is_no_sound_is_explained(page: Page) -> None:
    page.locator("#file").set_input_files({"name": "x.wav", "mimeType": "audio/wav", "buffer": b"no sound" * 100})
    expect(page.get_by_role("alert")).to_contain_text("not audio that can be read")
    assert names(page) == []


def test_a_late_answer_does_not_overwrite_a_newer_one(page: Page, site: Site) -> None:
    """The first search is held back until the second one is shown; then nothing may change."""
    held: list[Route] = []
    page.route("**/search", lambda route: held.append(route) if not held else route.continue_())
    page.locator("#file").set_input_files(site.corpus / "tone/1.wav")
    expect(page.locator("#status")).to_have_text("listening…")
    choose(page, site, "noise/2.wav")
    with contextlib.suppress(PlaywrightError):  # the page has given the first one up already
        held[0].continue_()
    page.wait_for_load_state("networkidle")
    assert names(page)[0] == "noise/2.wav"
    expect(page.locator("#status")).to_contain_text("sounds like 2.wav")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1280, "light"),
        pytest.param(390, "light", marks=pytest.mark.slow),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
    ],
)
def test_no_accessibility_rule_is_broken_and_nothing_overflows(page: Page, site: Site, width: int, scheme: str) -> None:
    page.set_viewport_size(ViewportSize(width=width, height=844))
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    for state in ("first", "hits", "map"):
        if state == "hits":
            choose(page, site, "tone/1.wav")
        elif state == "map":
            page.locator("#view-map").click()
            expect(page.locator("#map-legend li")).to_have_count(4)
        expect(page.locator(".sound").first).to_be_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if PICTURES:
            page.screenshot(path=str(Path(PICTURES) / f"page_{state}_{width}_{scheme}.png"))
