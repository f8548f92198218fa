"""What every page must be: quiet, no wider than its window, and nothing serious by axe-core."""

from __future__ import annotations

AXE = "() => axe.run(document, {resultTypes: ['violations']})"
OVERFLOW = """() => [document.documentElement.scrollWidth, document.documentElement.clientWidth,
  ...[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest('.scroll, pre')).slice(0, 3).map(e => e.outerHTML.slice(0, 80))]"""


def check(page, axe: str) -> None:
    """All of a page: quiet, no wider than the window, and nothing serious by axe-core, hidden tables opened."""
    page.evaluate("() => document.querySelectorAll('details:not(.keys)').forEach(e => { e.open = true })")
    width, window, *wide = page.evaluate(OVERFLOW)
    assert width <= window, f"the page is {width} wide in a window of {window}: {wide}"
    assert page.told == [], page.told
    page.evaluate(axe)
    violations = page.evaluate(AXE)["violations"]
    serious = [
        f"{one['id']}: {one['help']}: {node['html'][:120]}"
        for one in violations
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]
    assert serious == [], serious
