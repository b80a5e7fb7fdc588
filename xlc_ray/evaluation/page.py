"""The frame and the style of report.html. The drawings of figures.py take their colours and font from here."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

COLOURS = """
:root {
  color-scheme: light dark;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --page: #fcfcfb; --ink: #1b1d21; --muted: #676c74; --line: #e3e4e2; --accent: #2a64b8;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --ink: #e9eaec; --muted: #9aa0a8; --line: #30343a; --accent: #78a9f0; }
}
"""
STYLE = (
    COLOURS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 var(--sans); }
main { max-width: 62rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
.kicker { margin: 0; color: var(--accent); font-weight: 600; letter-spacing: .02em; }
h1 { margin: .1rem 0 1.6rem; font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; }
h1, h2 { text-wrap: balance; font-weight: 600; }
h2 { margin: 3.2rem 0 1rem; padding-top: 1.1rem; border-top: 1px solid var(--line); font-size: 1.2rem; }
.facts { display: flex; flex-wrap: wrap; gap: .9rem 2.6rem; margin: 0 0 2rem; }
dt { color: var(--muted); font-size: .82rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 0; }
figure.table { overflow-x: auto; }
figure.narrow { max-width: 28rem; }
figcaption { margin-top: .7rem; max-width: 50rem; color: var(--muted); font-size: .86rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem 0 .42rem 1.2rem; text-align: right; white-space: nowrap; font-weight: 400; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-size: .82rem; }
thead tr, tbody tr { border-bottom: 1px solid var(--line); }
.total th, .total td { font-weight: 600; }
.headline tr:first-child { border-top: 1px solid var(--line); }
.headline th { width: 11rem; font-weight: 600; }
.headline .big { width: 7rem; font-size: 1.2rem; font-weight: 600; }
.headline .text { padding-left: 2rem; text-align: left; white-space: normal; color: var(--muted); font-size: .9rem; }
details { margin-top: 2rem; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; }
pre { overflow-x: auto; padding: 1rem 0; font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, monospace; }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""
)
