"""Pages in a browser: how it shows them, what is true of all, and the contrast of texts as WCAG 2.2 computes it."""

import os
import re
from pathlib import Path

SCREENSHOTS = Path(os.environ.get("LOWLEVEL_SCREENSHOTS") or Path(__file__).parents[1] / "out")

# Each text with what lies under it, blended: [[text colour, background], ...]
CONTRASTS = """return ((texts) => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const under = (e) => {
    if (!e) return [255, 255, 255];
    const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
    const below = a < 1 ? under(e.parentElement) : [0, 0, 0];
    return [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
  };
  const seen = [...document.querySelectorAll(texts)];
  return seen.filter((e) => e.offsetParent && e.textContent.trim()).map((e) => {
    const [r, g, b] = parse(getComputedStyle(e).color);
    return [`rgb(${r}, ${g}, ${b})`, `rgb(${under(e).join(', ')})`];
  });
})(arguments[0])"""


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.2."""
    parts = [float(x) / 255 for x in re.findall(r"[\d.]+", colour)[:3]]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def least_contrast(driver, texts: str) -> float:
    """The least contrast of the visible texts of a page that a selector names."""
    return min(contrast(text, back) for text, back in driver.execute_script(CONTRASTS, texts))


def show_as(driver, size: tuple[int, int], dark: bool) -> None:
    """Show pages in a window of this size (a phone's, if it is narrow), light or dark."""
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    scheme.append({"name": "prefers-reduced-motion", "value": "reduce"})  # at an anchor at once
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})


def check_page(driver) -> None:
    """No message in the console, nothing fetched, nothing wider than the window."""
    assert driver.get_log("browser") == []
    assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def keep(driver, name: str) -> None:
    """A screenshot, in the folder that LOWLEVEL_SCREENSHOTS names, else in out/."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    assert driver.save_screenshot(str(SCREENSHOTS / f"{name}.png"))
