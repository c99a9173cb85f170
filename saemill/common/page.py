"""A report as one HTML page with no scripts and nothing to fetch."""

import html
from collections.abc import Iterable
from pathlib import Path

from saemill.common import durable

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Write the sections, which are HTML, one below the other."""
    page = PAGE.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(sections))
    durable.write_bytes(path, [page.encode()])


PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{title}}</title><style>
body{font:15px/1.5 system-ui,sans-serif;max-width:1250px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.25em .7em;border-bottom:1px solid #ddd;
text-align:right;vertical-align:top}td:first-child,th:first-child,td.text{text-align:left}
td small{display:block;color:#666;font-size:80%;white-space:nowrap}td.bad{background:#fde8e0}
h3 small{font-weight:normal;color:#666}td.name{white-space:nowrap}
mark{background:#ffd166;padding:0 1px}svg{max-width:640px;width:100%;font-size:11px}svg .grid{stroke:#eee}
.grid{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:300px}figcaption{font-size:85%}
td.passage{white-space:pre-line;max-width:60em}.notes{color:#444;font-size:92%}td.text{font-size:92%}
</style></head><body>
{{body}}
</body></html>
"""
