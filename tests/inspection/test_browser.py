"""The page in a real browser: pointer, keyboard, phone, light and dark, and not one line in its console.

Screenshots go to the folder that LOWLEVEL_SCREENSHOTS names, else to out/.
"""

import re
from pathlib import Path

import pytest
from contrast import check_page, keep, least_contrast, luminance, show_as
from samples import inspection_of_chats, inspection_of_pairs
from workspace import run

from lowlevel.inspection.page import write_page

DESKTOP, PHONE = (1280, 900), (390, 844)
TEXTS = ".tok, dt, dd, td, th, small, h1, h2, h3, figcaption, a, .prompt, .context"


class Sight:
    """A page as a person has it before them."""

    def __init__(self, driver, path: Path, *, size=DESKTOP, dark: bool = False) -> None:
        self.driver = driver
        show_as(driver, size, dark)
        driver.get_log("browser")
        driver.get(path.resolve().as_uri())

    def ask(self, script: str, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key)).perform()

    def hover(self, element) -> None:
        from selenium.webdriver import ActionChains

        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        ActionChains(self.driver).move_to_element(element).perform()

    @property
    def tip(self) -> dict[str, str] | None:
        """What the tip says, or None while it is hidden."""
        if self.ask("document.getElementById('tip').hidden"):
            return None
        names = [element.text for element in self.find("#tip dt")]
        values = [element.text for element in self.find("#tip dd")]
        return {"title": self.find("#tip strong")[0].text, **dict(zip(names, values, strict=True))}

    def keep(self, name: str) -> None:
        keep(self.driver, f"inspect-{name}")

    def check(self) -> None:
        """No message in the console, nothing fetched, nothing wider than the window, and the hostile tokens obeyed by
        nobody."""
        check_page(self.driver)
        assert self.ask("document.title") != "bad" and not self.find("img")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_base, pieces) -> dict[str, Path]:
    import helpers

    folder, policy = tmp_path_factory.mktemp("pages"), helpers.make_policy(tiny_base)
    made = {"pairs": inspection_of_pairs(policy, pieces), "chats": inspection_of_chats(policy, pieces)}
    for name, inspection in made.items():
        write_page(inspection, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


def test_a_token_shows_its_values_on_hover(browser, pages):
    sight = Sight(browser, pages["pairs"])
    assert sight.tip is None
    token = sight.find(".tok")[4]
    sight.hover(token)
    title, *lines = token.get_attribute("data-tip").split("\n")
    tip = sight.tip
    assert tip["title"] == title
    for name in ("policy", "reference", "log-ratio", "adds", "sum", "prob"):
        assert tip[name] == dict(line.split("\t") for line in lines)[name]
    assert token.get_attribute("aria-describedby") == "tip"
    assert sight.find("article .cursor:not([hidden])")
    sight.hover(sight.find("h1")[0])
    assert sight.tip is None and not sight.find(".cursor:not([hidden])")
    sight.check()


def test_a_token_shows_its_values_by_keyboard(browser, pages):
    sight = Sight(browser, pages["pairs"])
    sight.ask("document.querySelector('.heat').previousElementSibling.setAttribute('tabindex', -1)")
    sight.ask("document.querySelector('.heat').previousElementSibling.focus()")
    sight.press("TAB")
    tokens = sight.find(".heat:first-of-type")[0].find_elements("css selector", ".tok")
    assert sight.driver.switch_to.active_element == tokens[0]
    assert sight.tip["title"] == tokens[0].get_attribute("data-tip").split("\n")[0]
    sight.press("ARROW_RIGHT", "ARROW_RIGHT")
    assert sight.driver.switch_to.active_element == tokens[2]
    assert sight.tip["sum"] == re.search(r"sum\t(.*)", tokens[2].get_attribute("data-tip"))[1]
    sight.press("ARROW_LEFT")
    assert sight.driver.switch_to.active_element == tokens[1]
    sight.press("END")
    assert sight.driver.switch_to.active_element == tokens[-1]
    sight.press("ARROW_RIGHT")
    assert sight.driver.switch_to.active_element == tokens[-1]
    sight.press("HOME")
    assert sight.driver.switch_to.active_element == tokens[0] and sight.tip is not None
    sight.press("ESCAPE")
    assert sight.tip is None
    sight.press("TAB")  # the next text, not the next token
    assert sight.driver.switch_to.active_element == sight.find(".heat")[1].find_elements("css selector", ".tok")[0]
    sight.check()


def test_a_click_changes_the_colours(browser, pages):
    sight = Sight(browser, pages["pairs"])

    def colours():
        return sight.ask("[...document.querySelectorAll('.tok')].map(e => getComputedStyle(e).backgroundColor)")

    before = colours()
    assert len(set(before)) > 10
    for mode in ("surprise", "entropy"):
        sight.find(f"input[value={mode}] + span")[0].click()
        assert colours() != before
        shown = [e.get_attribute("data-for") for e in sight.find(".legend") if e.is_displayed()]
        assert shown == [mode]
    sight.find("input[value=entropy]")[0].send_keys("")
    sight.press("ARROW_LEFT", "ARROW_LEFT")  # radio buttons by keyboard
    assert colours() == before
    sight.check()


def test_links_go_from_pair_to_pair(browser, pages):
    sight = Sight(browser, pages["pairs"])
    unit = sight.find(".unit")[-1]
    sight.hover(unit)
    assert sight.tip["title"].startswith("row ") and sight.tip["margin"]
    unit.click()
    anchor = unit.get_attribute("href").split("#")[1]
    assert sight.ask("location.hash") == f"#{anchor}"
    sight.driver.execute_script("document.documentElement.style.scrollBehavior = 'auto'")
    for step in ("next", "next", "previous"):
        here = sight.ask("location.hash.slice(1)")
        links = sight.find(f"[id='{here}'] nav a[aria-label^={step}]")
        if links:
            links[0].click()
            assert sight.ask("location.hash.slice(1)") != here
    sight.check()


def test_the_chart_and_the_tokens_point_at_each_other(browser, pages):
    sight = Sight(browser, pages["pairs"])
    article = sight.find("article")[1]
    canvas = article.find_element("css selector", ".canvas")
    sight.hover(canvas)
    tokens = article.find_elements("css selector", ".tok")
    (on,) = article.find_elements("css selector", ".tok.on")
    assert tokens.index(on) == len(tokens) // 2
    cursor = article.find_element("css selector", ".cursor")
    left = 100 * (tokens.index(on) + 0.5) / len(tokens)
    assert float(cursor.get_attribute("style").split("left: ")[1].split("%")[0]) == pytest.approx(left, abs=0.01)
    dot = cursor.find_element("css selector", "b")
    assert f"top: {float(on.get_attribute('data-y')):g}%" in dot.get_attribute("style")
    sight.check()


@pytest.mark.parametrize("name", ["pairs", "chats"])
@pytest.mark.parametrize("look", ["light", "dark", "phone", "phone-dark"])
def test_every_look_fits_and_can_be_read(browser, pages, name, look):
    sight = Sight(browser, pages[name], size=PHONE if "phone" in look else DESKTOP, dark="dark" in look)
    paper, ink = sight.ask("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    assert (luminance(paper) > luminance(ink)) != ("dark" in look)
    assert least_contrast(browser, TEXTS) >= 4.5
    sight.ask("document.querySelector('.tok').focus()")
    tip = sight.find("#tip")[0].rect
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= (PHONE if "phone" in look else DESKTOP)[0]
    sight.keep(f"{name}-{look}")
    sight.check()


def test_the_page_of_a_real_run(browser, runs, tmp_path):
    for name, folder in (("dpo", runs.dpo), ("sft", runs.sft)):
        said = run("inspect", folder, "--step", 4, "--html", tmp_path / f"{name}.html")
        assert said.code == 0, said.err
        sight = Sight(browser, tmp_path / f"{name}.html")
        assert sight.find("h1")[0].text == f"{name} step 4"
        assert "step-00000003, the weights before step 4; dropout off" in sight.find(".facts")[0].text
        sight.keep(f"run-{name}")
        sight.check()
