"""The style of the page: light and dark, on a phone and on paper; nothing is loaded from elsewhere."""

# Colours in the order of charts' curves; the first four are those of the other figures, lighter where the page is dark.
LIGHT = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0e7490", "#57534e")
DARK = ("#fb923c", "#7aa7ff", "#4ade80", "#c79bff", "#facc15", "#f78ab8", "#4fd1e5", "#b8b2ac")


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{place}: {colour};" for place, colour in enumerate(colours))


def _classes() -> str:
    return "\n".join(f".c{place} {{ --c: var(--c{place}); }}" for place in range(len(LIGHT)))


DARK_PAGE = f"""--paper: #17181b; --ink: #ece9e6; --quiet: #a8a29e; --line: #383a40; --soft: #212328; --warn: #3a3012;
  --warn-line: #d6a100; --good: #4ade80; --bad: #f87171; --turn: #fbbf24; {_variables(DARK)}"""

STYLE = f"""
:root {{ color-scheme: light dark; --paper: #ffffff; --ink: #1c1917; --quiet: #6b645f; --line: #e2deda; --soft: #f6f4f1;
  --warn: #fff4d6; --warn-line: #d6a100; --good: #15803d; --bad: #b91c1c; --turn: #b45309; {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ {DARK_PAGE} }} }}
:root[data-theme=dark] {{ color-scheme: dark; {DARK_PAGE} }}
:root[data-theme=light] {{ color-scheme: light; }}
{_classes()}
* {{ box-sizing: border-box; }}
html {{ background: var(--paper); color: var(--ink); }}
body {{ font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; margin: 0 auto;
  max-width: 1080px; padding: 24px 20px 64px; }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin: 36px 0 10px; padding-top: 12px; border-top: 1px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin: 28px 0 8px; }}
h4 {{ font-size: 0.95rem; margin: 20px 0 6px; }}
p {{ margin: 6px 0; max-width: 76ch; }}
ul {{ margin: 6px 0; padding-left: 20px; max-width: 86ch; }}
li {{ margin: 3px 0; overflow-wrap: anywhere; }}
code {{ font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
a {{ color: inherit; text-underline-offset: 3px; }}
.quiet, .interval {{ color: var(--quiet); }}
.quiet {{ font-size: 0.92em; }}
.place {{ overflow-wrap: anywhere; }}
.interval {{ font-size: 0.92em; white-space: nowrap; }}
.warning {{ background: var(--warn); border-left: 4px solid var(--warn-line); padding: 8px 14px; margin: 12px 0; }}
.badge {{ display: inline-block; border: 1.5px solid currentColor; border-radius: 999px; padding: 0 10px; font-weight: 650;
  color: var(--quiet); white-space: nowrap; }}
.badge.generalizing {{ color: var(--good); }}
.badge.memorizing {{ color: var(--bad); }}
.badge.turning {{ color: var(--turn); }}
.verdict {{ font-size: 1.1rem; }}
.said {{ background: var(--soft); border-radius: 10px; padding: 12px 18px; margin: 10px 0; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 10px 20px; margin: 12px 0; }}
.facts dt {{ color: var(--quiet); font-size: 0.85em; }}
.facts dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px 28px; }}
figure {{ margin: 0; }}
.chart svg[role] {{ width: 100%; height: auto; display: block; }}
.chart text {{ font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--quiet); }}
.chart text.word {{ fill: var(--c); font-weight: 600; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }}
data {{ white-space: nowrap; }}
.grid {{ stroke: var(--line); stroke-width: 1; }}
.axis {{ stroke: var(--quiet); stroke-width: 1; }}
.curve {{ stroke: var(--c); stroke-width: 1.8; fill: none; stroke-linejoin: round; }}
.dashed {{ stroke-dasharray: 5 4; }}
.dotted {{ stroke-dasharray: 1.5 4; stroke-linecap: round; }}
.mark {{ stroke: var(--c); stroke-width: 1.4; }}
.band {{ fill: var(--c); fill-opacity: 0.15; stroke: none; }}
rect.band {{ fill-opacity: 0.08; }}
.dot {{ fill: var(--c); stroke: none; }}
.cursor {{ stroke: var(--quiet); stroke-width: 1; pointer-events: none; }}
.values {{ min-height: 1.5em; margin: 0; font-variant-numeric: tabular-nums; }}
.chart svg[role]:focus-visible {{ outline: 2px solid var(--quiet); outline-offset: 2px; }}
.chart svg[role] {{ touch-action: pan-y; user-select: none; }}
button.theme {{ float: right; font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line);
  border-radius: 999px; padding: 2px 12px; cursor: pointer; }}
.dot:hover {{ stroke: var(--ink); stroke-width: 1.5; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 2px 0 0; font-size: 0.88em; }}
.legend svg {{ vertical-align: middle; }}
.picture img {{ max-width: 100%; height: auto; display: block; background: #ffffff; border-radius: 4px; }}
.picture {{ margin: 10px 0; }}
.pair {{ display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); gap: 0 24px; align-items: start; }}
figcaption {{ margin: 2px 0 4px; }}
.picture figcaption {{ color: var(--quiet); font-size: 0.9em; max-width: 76ch; }}
.scroll {{ overflow-x: auto; margin: 8px 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92em; }}
th, td {{ text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); }}
thead th {{ color: var(--quiet); font-weight: 500; white-space: nowrap; }}
tbody th {{ font-weight: 500; }}
tbody th {{ min-width: 13ch; }}
td, tbody th {{ max-width: 44ch; overflow-wrap: break-word; }}
td code, th code {{ overflow-wrap: break-word; }}
.pairs td {{ max-width: 70ch; }}
details {{ margin: 10px 0; }}
summary {{ cursor: pointer; padding: 4px 0; color: var(--ink); }}
section.run > details > summary {{ font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }}
section.run {{ border-top: 1px solid var(--line); padding-top: 6px; }}
footer {{ margin-top: 40px; border-top: 1px solid var(--line); padding-top: 10px; }}
@media (max-width: 600px) {{ body {{ padding: 16px 12px 48px; }} .chart text {{ font-size: 14px; }}
  .said {{ padding: 10px 12px; }} .pair {{ display: block; }} .wide {{ min-width: 680px; }} }}
@media print {{ button.theme, .values {{ display: none; }}
  :root, :root[data-theme] {{ --paper: #ffffff; --ink: #000000; --quiet: #444444; --line: #cccccc; --soft: #ffffff;
  {_variables(LIGHT)} }}
  body {{ max-width: none; padding: 0; font-size: 10.5pt; }} .said {{ border: 1px solid var(--line); }}
  details::details-content {{ content-visibility: visible; block-size: auto; }}
  figure, tr, .said {{ break-inside: avoid; }} .scroll {{ overflow: visible; }} a {{ text-decoration: none; }} }}
"""
