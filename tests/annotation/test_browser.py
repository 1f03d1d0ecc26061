"""The page in a real browser: keyboard, reload, two tabs, a killed server, phone, light and dark.

Screenshots go to the folder that LOWLEVEL_SCREENSHOTS names, else to out/.
"""

import multiprocessing

import pytest
from contrast import keep, least_contrast, luminance, show_as
from hostile import CODE, CUT, HEBREW, MARKUP, PAIRS, served

from lowlevel.annotation.journal import Journal, journal_path
from lowlevel.annotation.server import AnnotationServer

pytest.importorskip("selenium", reason="no selenium here: pip install lowlevel[dev]")
from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

DESKTOP, PHONE = (1280, 900), (390, 844)
TEXTS = ".text, .turn > b, button, kbd, h1, h3, small, label, p, #count, #notice"


class Desk:
    """A person before the page."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.look(DESKTOP)
        driver.get_log("browser")

    def look(self, size, *, dark: bool = False) -> None:
        show_as(self.driver, size, dark)

    def open(self, url: str, name: str | None = None) -> None:
        self.driver.get(url)
        if name:
            self.press(*name, Keys.ENTER)
        self.wait_for("#who")

    def at(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def wait_for(self, selector: str, text: str = "") -> None:
        def seen(driver) -> bool:
            return self.at(selector).is_displayed() and text in self.at(selector).text

        WebDriverWait(self.driver, 5, 0.02).until(seen)

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def judged(self, number: int) -> None:
        self.wait_for("#count", f"{number} of {len(PAIRS)} judged")

    def check(self, *, errors: int = 0) -> None:
        """Nothing in the console, nothing wider than the window, nothing fetched elsewhere, no text obeyed."""
        assert len(self.driver.get_log("browser")) == errors
        assert self.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        here = "performance.getEntriesByType('resource').every((e) => e.name.startsWith(location.origin))"
        assert self.driver.execute_script(f"return {here}")
        assert self.driver.title == "lowlevel annotate" and not self.driver.find_elements(
            "css selector", "img, main b b"
        )


@pytest.fixture
def desk(browser):
    yield Desk(browser)
    first, *others = browser.window_handles
    for handle in others:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(first)


def choices(server) -> list[str]:
    return [one.choice for one in Journal(server.journal.path).judgements.values()]


def test_everything_by_keyboard(desk, server):
    desk.open(server.url, "Ada")
    desk.judged(0)
    code = [block.text for block in desk.driver.find_elements("css selector", "#pair pre")]
    assert sorted(code) == sorted(["```" + text.split("```")[1] + "```" * (text is CODE) for text in (CODE, CUT)])
    turns = [turn.text for turn in desk.driver.find_elements("css selector", ".turn .text")]
    assert turns == [turn["content"] for turn in PAIRS[0].prompt]
    for number, key in enumerate((Keys.ARROW_LEFT, "b", Keys.ARROW_RIGHT, "t"), 1):
        desk.press(key)
        desk.judged(number)
    desk.wait_for("#end")
    assert choices(server) == ["left", "bad", "right", "tie"]
    desk.press("u")
    desk.judged(3)
    desk.press("e", *"tbu", Keys.ESCAPE, "b")
    desk.judged(4)
    assert choices(server) == ["left", "bad", "right", "bad"]
    assert server.journal.last("Ada").written == "tbu"
    desk.check()


def test_by_pointer_and_texts_are_only_texts(desk, server):
    desk.open(server.url, "Ada")
    desk.at("[data-choice=tie]").click()
    desk.judged(1)
    assert desk.at("#prompt .text").text == MARKUP
    desk.at("#edit").click()
    side = "left" if desk.at("#left").text == MARKUP else "right"
    desk.at(f"[data-copy={side}]").click()
    assert desk.at("#written").get_property("value") == MARKUP
    desk.at("[data-choice=left]").click()
    desk.wait_for("#notice", "is one of the two replies")
    desk.judged(1)
    desk.press("e", Keys.END, "!", Keys.ESCAPE)
    desk.at("[data-choice=left]").click()
    desk.judged(2)
    assert server.journal.last("Ada").written == MARKUP + "!"
    desk.check(errors=1)  # the answer 400


def test_a_reload_keeps_place_name_and_draft(desk, server):
    desk.open(server.url, "Ada")
    desk.press("t")
    desk.judged(1)
    desk.press("e", *"draft", Keys.ESCAPE)
    desk.driver.refresh()
    desk.judged(1)
    assert desk.at("#rename").text == "Ada"
    assert desk.at("#written").get_property("value") == "draft" and desk.at("#written").is_displayed()
    desk.press(Keys.ARROW_LEFT)
    desk.judged(2)
    assert not desk.at("#written").is_displayed()
    desk.press("u")
    desk.judged(1)
    assert desk.at("#written").get_property("value") == "draft"  # what was taken back can be changed
    desk.check()


def test_two_tabs_judge_a_pair_once(desk, server):
    desk.open(server.url, "Ada")
    desk.driver.switch_to.new_window("tab")
    desk.open(server.url)
    desk.judged(0)
    desk.press("t")
    desk.judged(1)
    first, second = desk.driver.window_handles
    desk.driver.switch_to.window(first)
    desk.judged(0)
    desk.press("b")
    desk.wait_for("#notice", "judged before, perhaps in another tab")
    desk.judged(1)
    assert choices(server) == ["tie"]
    desk.press("b")
    desk.judged(2)
    assert choices(server) == ["tie", "bad"] and not desk.at("#notice").is_displayed()
    desk.driver.switch_to.window(second)
    desk.press("u")  # of the first pair, which is not the last one any more
    desk.wait_for("#notice", "not your last one")
    assert choices(server) == ["tie", "bad"]
    desk.check()


def test_each_annotator_sees_every_pair(desk, server):
    desk.open(server.url, "Ada")
    desk.press("t")
    desk.judged(1)
    desk.at("#rename").click()
    desk.press(*"Bo", Keys.ENTER)
    desk.judged(0)
    desk.press("b")
    desk.judged(1)
    assert [one.annotator for one in server.journal.judgements.values()] == ["Ada", "Bo"]
    desk.check()


def serve_in_child(opened, pipe) -> None:
    with opened as journal, AnnotationServer() as server:
        server.journal = journal
        pipe.send(server.url)
        server.serve_forever()


def test_a_killed_server_loses_nothing(desk, journal_of, out):
    """kill -9 between two judgements: the page says so and keeps its text; --resume goes on."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=serve_in_child, args=(journal_of(), theirs))
    child.start()
    desk.open(ours.recv(), "Ada")
    for number, key in enumerate((Keys.ARROW_LEFT, "b"), 1):
        desk.press(key)
        desk.judged(number)
    child.kill()
    child.join()
    desk.press("e", *"mine", Keys.ESCAPE, "t")
    desk.wait_for("#notice", "not saved; all judgements before it are")
    desk.judged(2)
    assert desk.at("#written").get_property("value") == "mine"
    assert desk.driver.get_log("browser")  # the refused connection
    assert [one.choice for one in Journal(journal_path(out)).judgements.values()] == ["left", "bad"]
    with journal_of(resume=True) as journal, served(journal) as server:
        desk.open(server.url, "Ada")
        desk.judged(2)
        desk.press("t")
        desk.judged(3)
        assert choices(server) == ["left", "bad", "tie"]
        desk.check()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_look_fits_and_can_be_read(desk, server, size, dark):
    desk.look(size, dark=dark)
    desk.open(server.url, "Ada")
    for number in range(len(PAIRS)):
        desk.judged(number)
        paper = desk.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (luminance(paper) < 0.2) == dark
        assert least_contrast(desk.driver, TEXTS) >= 4.5
        if PAIRS[number].replies[0] is HEBREW:
            lines = desk.driver.execute_script(LINES, HEBREW)
            assert lines[0]["right"] == lines[2]["right"] > lines[1]["right"] and lines[1]["left"] < lines[0]["left"]
        keep(desk.driver, f"annotate-{number}-{'phone' if size == PHONE else 'desktop'}{'-dark' * dark}")
        desk.press("b")
    desk.wait_for("#end")
    desk.check()


# Where each line of a text stands
LINES = """
  const block = [...document.querySelectorAll('.text')].find((e) => e.textContent === arguments[0]);
  let start = 0;
  return arguments[0].split('\\n').map((line) => {
    const range = document.createRange();
    range.setStart(block.firstChild, start);
    range.setEnd(block.firstChild, start + line.length);
    start += line.length + 1;
    const { left, right } = range.getBoundingClientRect();
    return { left: Math.round(left), right: Math.round(right) };
  });
"""
