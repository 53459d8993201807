"""The page in a real browser: ask by file, by drop, by microphone and by hit; see, hear and narrow what comes back."""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import HOW_TO_GET, find_browser
from playwright.sync_api import Browser, Page, expect, sync_playwright
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
    context = browser.new_context(permissions=["microphone"])
    context.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    page = context.new_page()
    errors: list[str] = []
    strangers: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: strangers.append(request.url))
    page.goto(site.url)
    expect(page.locator("#release")).to_contain_text("12 items")
    yield page
    context.close()
    assert errors == []
    assert [url for url in strangers if not url.startswith((site.url, "data:", "blob:"))] == []


def choose(page: Page, site: Site, uri: str) -> None:
    """Ask with a file of the corpus and wait for the hits."""
    page.locator("#file").set_input_files(site.corpus / uri)
    expect(page.locator("#status")).to_contain_text(f"hits for {Path(uri).name}")


def names(page: Page) -> list[str]:
    """The uris of the hits shown."""
    return page.locator(".hit .name").all_text_contents()


def test_a_chosen_file_finds_itself_and_shows_pictures(page: Page, site: Site) -> None:
    choose(page, site, "tone/1.wav")
    assert names(page)[0] == "tone/1.wav" and len(names(page)) == 12
    expect(page.locator("#query-picture")).to_be_visible()
    lit = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, 480, 96).data).size"
    assert page.locator("#query-picture").evaluate(lit) > 50
    picture = page.locator(".hit img").first
    picture.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.hit img').naturalWidth > 0")


def test_a_hit_plays(page: Page, site: Site) -> None:
    choose(page, site, "tone/1.wav")
    page.locator(".hit audio").first.evaluate("audio => { audio.muted = true; audio.play(); }")
    page.wait_for_function("document.querySelector('.hit audio').currentTime > 0.1")


def test_more_like_this_leaves_the_hit_out(page: Page, site: Site) -> None:
    choose(page, site, "noise/1.wav")
    page.locator(".hit .similar").first.click()
    expect(page.locator("#status")).to_contain_text("more like noise/1.wav")
    assert len(names(page)) == 11 and "noise/1.wav" not in names(page)


def test_a_value_narrows_the_hits_to_its_like(page: Page, site: Site) -> None:
    choose(page, site, "clicks/0.wav")
    page.locator(".hit").filter(has_text="tone/0.wav").get_by_text("label: tone").click()
    expect(page.locator(".hit")).to_have_count(3)
    assert all(name.startswith("tone/") for name in names(page))


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
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})
    expect(page.locator("#status")).to_contain_text("hits for dropped.wav")
    assert names(page)[0] == "chirp/2.wav"


def test_the_microphone_is_heard(page: Page) -> None:
    page.locator("#record").click()
    expect(page.locator("#record")).to_contain_text("(2 s)")
    page.locator("#record").click()
    expect(page.locator("#status")).to_contain_text("hits for recording")
    assert len(names(page)) == 12
    expect(page.locator("#record")).to_have_text(re.compile("Record"))


def test_what_is_no_sound_is_explained(page: Page) -> None:
    page.locator("#file").set_input_files({"name": "x.wav", "mimeType": "audio/wav", "buffer": b"no sound" * 100})
    expect(page.get_by_role("alert")).to_contain_text("not audio that can be read")
    assert names(page) == []


def test_words_are_off_where_the_release_cannot_hear_them(page: Page) -> None:
    expect(page.locator("#text")).to_be_disabled()
    expect(page.locator("#text-reason")).to_contain_text("sound alone")
