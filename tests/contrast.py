"""Contrast of texts on a page in a browser, as WCAG 2.2 computes it."""

import re

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
