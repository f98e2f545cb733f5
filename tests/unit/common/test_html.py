"""Cards of objects in notebooks."""

from __future__ import annotations

from pipeline.common.html import html_table


def test_texts_are_escaped_and_commands_are_calls() -> None:
    html = html_table("a <b>", [("next", "python -m pipeline verify j-1"), ("none", ""), ("x", "<script>")])
    assert "a &lt;b&gt;" in html
    assert "<td>pipeline.verify(&quot;j-1&quot;)</td>" in html
    assert "none" not in html.partition("</style>")[2]
    assert "<script" not in html


def test_nothing_comes_from_the_network() -> None:
    html = html_table("x", [("a", "b")], tone="bad", share=2.0)
    assert not any(word in html for word in ("http", "url(", "@import", "<script", "src="))
    assert "width:100.0%" in html
