"""Pages: what they show is escaped, sums as it should, and says what the numbers say."""

from __future__ import annotations

import functools
import json
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_plots import Calibration, GapReport, bracket, gaps
from typer.testing import CliRunner

from llmppl.cli import app
from llmppl.demo import infilling as demo
from llmppl.demo import report
from llmppl.display import posterior_html, posterior_table, prefix_tree, report_page
from llmppl.display.prefix_tree import Node, _lines, build
from llmppl.display.token_marks import coloured, pieces, shade
from llmppl.guides import WordGuide
from llmppl.models import infilling, keyword
from llmppl.posterior.posterior import Posterior
from llmppl.testing import tiny_lm

ALPHABET = [b".", b"a", b"<b>", b"&", b'"', b"\n", "é".encode()[:1], "é".encode()[1:], b" c"]


def decode(ids: np.ndarray) -> str:
    return b"".join(ALPHABET[i] for i in ids if i >= 0).decode("utf-8", errors="replace")


def posterior(rows: dict[tuple[int, ...], list[float]], **changes: Any) -> Posterior:
    """Samples by their token ids, with the weights of the samples that have them."""
    width = max(map(len, rows))
    ids = np.array([[*row, *[-1] * (width - len(row))] for row, weights in rows.items() for _ in weights])
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.concatenate([*rows.values()]))
    generator = np.random.default_rng(4)
    scores = {name: np.where(ids >= 0, generator.normal(-2, 1, ids.shape), 0.0) for name in "pq"}
    fields: dict[str, Any] = {
        "samples": {"middle": ids},
        "log_weights": log_weights,
        "log_joint": np.arange(len(ids)) - 50.0,
        "decoders": {"middle": decode, "ending": decode},
        "observed": {"ending": np.array([2, 5, 0])},
        "token_log_p": {"middle": scores["p"]},
        "token_log_q": {"middle": scores["q"]},
    }
    return Posterior(**{**fields, **changes})


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Elements below, in the order of the page."""
        found = []
        waiting = [child for child in reversed(self.children) if isinstance(child, Element)]
        while waiting:
            element = waiting.pop()
            if element.tag == tag and (kind is None or kind in (element.attributes.get("class") or "").split()):
                found.append(element)
            waiting += [child for child in reversed(element.children) if isinstance(child, Element)]
        return found


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Tree(HTMLParser):
    """A strict parser: every element is closed, by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Element:
    parser = Tree()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root]
    return parser.root


def percent(text: str) -> float:
    return float(re.findall(r"([\d.]+) ?%", text)[-1])


# --- tokens ----------------------------------------------------------------------------------------


def test_pieces_join_to_the_text_and_bytes_of_one_character_stay_together() -> None:
    ids = np.array([1, 6, 7, 8, 0, -1, -1])
    found = pieces(ids, decode)
    assert [(p.text, p.start, p.stop) for p in found] == [("a", 0, 1), ("é", 1, 3), (" c", 3, 4), (".", 4, 5)]
    # A half character at the end is shown as the decoder shows it.
    assert "".join(p.text for p in pieces(np.array([1, 6]), decode)) == decode(np.array([1, 6]))
    assert pieces(np.array([-1]), decode) == []


def test_a_decoder_that_eats_the_first_space_loses_none_here() -> None:
    def stripped(ids: np.ndarray) -> str:
        return decode(ids).removeprefix(" ")

    assert [p.text for p in pieces(np.array([8, 8, 0]), stripped)] == ["c", " c", "."]


@pytest.mark.parametrize(
    ("difference", "kind"),
    [(0.0, "even"), (0.09, "even"), (0.1, "up1"), (0.7, "up2"), (1.5, "up3"), (9.0, "up4"), (np.inf, "up4")],
)
def test_the_colour_follows_the_sign_and_size_of_the_difference(difference: float, kind: str) -> None:
    assert shade(difference) == kind
    assert shade(-difference) == kind.replace("up", "down")
    assert shade(np.nan) == "even"


def test_every_token_of_the_table_has_the_colour_of_its_own_scores() -> None:
    made = posterior({(1, 2, 3, 0): [1.0], (6, 7, 4, 0): [0.5]})
    seen = set()
    table = parse(posterior_table(made, "middle"))
    marked = table.all("summary", "marked")
    for sample, text in enumerate(marked):
        spans = [span for span in text.children if isinstance(span, Element)]
        p, q = (getattr(made, f"token_log_{name}")["middle"][sample] for name in "pq")
        bounds = [(0, 1), (1, 2), (2, 3), (3, 4)] if sample == 0 else [(0, 2), (2, 3), (3, 4)]
        assert len(spans) == len(bounds)
        for span, (start, stop) in zip(spans, bounds, strict=True):
            guide, prior = q[start:stop].sum(), p[start:stop].sum()
            kind = span.attributes["class"]
            seen.add(kind[:2])
            assert kind.startswith("up" if guide - prior >= 0.1 else "down" if guide - prior <= -0.1 else "even")
            assert f"guide {guide:.2f}, prior {prior:.2f}" in span.attributes["title"]
    assert {"up", "do"} <= seen


def test_without_scores_tokens_have_no_colour_and_there_is_no_legend() -> None:
    bare = posterior_table(posterior({(1, 0): [1.0]}, token_log_q={}), "middle")
    assert "up" not in {e.attributes.get("class") for e in parse(bare).all("span")}
    assert "legend" not in re.sub(r"<style>.*?</style>", "", bare, flags=re.DOTALL)


# --- table -----------------------------------------------------------------------------------------


def test_weights_of_the_table_are_those_of_the_texts_and_sum_to_the_caption() -> None:
    made = posterior({(1, 0): [1.0, 3.0], (2, 0): [2.0], (3, 0): [4.0, 4.0], (4, 0): [0.0]})
    for count in (2, 20):
        table = parse(posterior_table(made, "middle", count))
        rows = table.all("tr")
        cells = [cell.text for cell in table.all("td", "weight")]
        expected = [57.1, 28.6, 14.3, 0.0][:count]
        assert [percent(cell) for cell in cells] == expected
        caption = table.all("caption")[0].text
        assert f"{len(cells)} of 4 distinct texts" in caption
        assert percent(caption) == pytest.approx(sum(expected), abs=0.2)
        assert len(rows) > len(cells)
    # The bar of the heaviest is full, the others are in proportion.
    bars = [float(re.findall(r"[\d.]+", bar.attributes["style"])[0]) for bar in table.all("i")]
    assert bars == pytest.approx([100, 50, 25, 0])
    # The log-joint is the largest of the samples with the text: those numbered 3 and 4 have the heaviest.
    joints = [row.children[1].text for row in rows if row.all("td", "weight")]
    assert joints == ["−46.00", "−49.00", "−48.00", "−45.00"]


def test_texts_are_escaped_and_line_breaks_are_seen() -> None:
    made = posterior({(2, 3, 4, 5, 0): [1.0]})
    for page in (posterior_table(made, "middle"), prefix_tree(made, "middle"), posterior_html(made)):
        root = parse(page)
        assert not root.all("b")
        assert '<b>&"⏎\n.' in root.text
    title = parse(posterior_table(made, "middle")).all("span", None)
    assert any((span.attributes.get("title") or "").startswith("'<b>': guide") for span in title)
    assert "onmouseover" not in coloured(pieces(np.array([4]), decode)[0], np.zeros(1), np.zeros(1))


def test_points_of_decoding_stand_by_their_joint_without_weights() -> None:
    made = posterior({(1, 0): [1.0], (2, 0): [1.0]}, method="decoding")
    made.log_weights[:] = np.nan
    table = parse(posterior_table(made, "middle"))
    assert [cell.text for cell in table.all("td", "weight")] == ["n/a", "n/a"]
    assert table.all("summary")[0].text.startswith("<b>")
    with pytest.raises(ValueError, match="no weights"):
        prefix_tree(made, "middle")


def test_a_sample_of_several_texts_shows_them_all() -> None:
    ids = np.array([[[1, 0], [2, 0]], [[1, 0], [3, 0]]])
    made = Posterior({"middle": ids}, np.zeros(2), np.zeros(2), decoders={"middle": decode})
    table = parse(posterior_table(made, "middle"))
    assert [line.text for line in table.all("div", "marked")] == ["a.", "<b>.", "a.", "&."]
    with pytest.raises(ValueError, match="holds several texts"):
        prefix_tree(made, "middle")


def test_what_a_table_cannot_show_is_said() -> None:
    made = posterior({(1, 0): [1.0]})
    with pytest.raises(KeyError, match="no latent text site 'ending'"):
        posterior_table(made, "ending")
    with pytest.raises(ValueError, match="count must be at least 1"):
        posterior_table(made, "middle", 0)
    rows = Posterior({}, np.zeros((3, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"Ask for one row: posterior.row\(0\)"):
        posterior_table(rows, "middle")


# --- tree ------------------------------------------------------------------------------------------

BRANCHING = {
    (1, 2, 3, 0): [4.0],
    (1, 2, 3, 8, 0): [1.0],
    (1, 2, 4, 0): [2.0, 1.0],
    (1, 2): [1.0],
    (6, 7, 0): [0.5],
    (6, 7, 8, 0): [0.25],
    (8, 0): [0.25],
    (3, 0): [0.0],
}


def nodes(node: Node) -> list[Node]:
    return [node, *(below for child in node.children for below in nodes(child))]


def test_the_masses_of_children_sum_to_their_parents() -> None:
    root = build(posterior(BRANCHING), "middle")
    assert root.mass == pytest.approx(1.0)
    for node in nodes(root):
        assert len(node.children) != 1, "chains of single children are merged"
        if node.children:
            assert sum(child.mass for child in node.children) == pytest.approx(node.mass)
            assert sum(child.count for child in node.children) == node.count
    assert [(child.text, child.mass) for child in root.children] == [
        ("a<b>", pytest.approx(0.9)),
        ("é", pytest.approx(0.075)),
        (" c.", pytest.approx(0.025)),
    ]
    first = root.children[0]
    assert [(child.text, child.mass) for child in first.children] == [
        ("&", pytest.approx(0.5)),
        ('".', pytest.approx(0.3)),
        ("", pytest.approx(0.1)),
    ]


def test_leaves_spell_the_texts_with_their_weights() -> None:
    made = posterior(BRANCHING)

    def leaves(node: Node, before: str) -> list[tuple[str, float]]:
        text = before + node.text
        return [pair for child in node.children for pair in leaves(child, text)] or [(text, node.mass)]

    expected = {text: weight for text, weight in made.top("middle", 20) if weight > 0}
    assert dict(leaves(build(made, "middle"), "")) == pytest.approx(expected)


def line_mass(element: Element) -> float:
    return percent(element.all("span", "mass")[0].text)


def check_sums(element: Element) -> None:
    """Every unfolded branch: its lines sum to what it says."""
    for branch in element.all("details"):
        inside = next(child for child in branch.children if isinstance(child, Element) and child.tag == "div")
        lines = [child for child in inside.children if isinstance(child, Element)]
        assert sum(line_mass(line) for line in lines) == pytest.approx(line_mass(branch), abs=0.06 * (len(lines) + 1))


def test_the_page_of_the_tree_gathers_small_branches_and_its_lines_still_sum() -> None:
    root = parse(prefix_tree(posterior(BRANCHING), "middle", smallest=0.08))
    check_sums(root)
    more = [line.text for line in root.all("div", "more")]
    assert more == ["10.0 %2 more, 10.0 %"]
    # A single small branch has a line of its own: gathering it would hide it and save nothing.
    whole = parse(prefix_tree(posterior(BRANCHING), "middle", smallest=0.03))
    assert not whole.all("div", "more")
    assert "ends here" in whole.text
    check_sums(whole)


def test_the_tree_does_not_depend_on_the_order_of_samples() -> None:
    made = posterior(BRANCHING)
    order = np.random.default_rng(1).permutation(made.num_samples)
    assert prefix_tree(made, "middle") == prefix_tree(made.taken(order), "middle")


def test_a_tree_deeper_than_python_recurses_is_drawn() -> None:
    depth = sys.getrecursionlimit() + 50
    root = Node("", 1.0, depth + 1, [])
    node = root
    for _ in range(depth):
        node.children = [Node("a", 1.0, 2, []), Node("", 0.0, 1)]
        node = node.children[0]
    lines = "".join(_lines(root, 0.0))
    assert lines.count("<details") == lines.count("</details>") == depth - 1
    assert lines.count("ends here") == depth


# --- notebooks -------------------------------------------------------------------------------------


def test_a_notebook_shows_the_numbers_of_every_row_and_how_to_get_one() -> None:
    log_weights = np.random.default_rng(0).normal(size=(40, 3))
    made = Posterior({"middle": np.zeros((40, 3, 2), int)}, log_weights, log_weights, decoders={"middle": decode})
    root = parse(made._repr_html_())
    rows = root.all("table", "numbers")[0].all("tbody")[0].all("tr")
    assert len(rows) == 3
    for n, row in enumerate(rows):
        cells = [cell.text for cell in row.all("td")]
        one = made.row(n)
        expected = [one.log_evidence, one.log_evidence_error, one.elbo, one.ess, one.khat]
        assert cells == [str(n), *(f"{value:.2f}".replace("-", "−") for value in expected)]
    assert "posterior.row(0)" in root.text


@pytest.mark.parametrize("method", ["enumeration", "smc", "mcmc", "decoding"])
@pytest.mark.parametrize("rows", [(), (2,)])
def test_a_notebook_shows_posteriors_of_every_method(method: str, rows: tuple[int, ...]) -> None:
    shape = (40, *rows)
    log_joint = np.random.default_rng(0).normal(size=shape)
    more: dict[str, Any] = {"num_chains": 2, "acceptance": np.full((2, *rows), 0.5)} if method == "mcmc" else {}
    weights = {"mcmc": np.zeros(shape), "decoding": np.full(shape, np.nan)}.get(method, log_joint)
    samples = {"middle": np.random.default_rng(1).integers(0, 5, (*shape, 2))}
    made = Posterior(samples, weights, log_joint, method=method, decoders={"middle": decode}, **more)
    assert parse(made._repr_html_()).all("table")


# --- report ----------------------------------------------------------------------------------------


class Finding(NamedTuple):
    status: str
    claim: str
    number: Any
    advice: str


@dataclass
class Diagnosis:
    posterior: Any
    verdict: str = "Far from it: 3 <b>5 & more."
    findings: tuple[Finding, ...] = (
        Finding("certified", "KL(q‖p) is at most <i>5", "<s>4.9 ± 0.1", "train <u>on"),
        Finding("failed", "the weights", 0.913, ""),
        Finding("unknown", "an upper bound", None, "simulate"),
    )
    bounds: Any = None
    calibration: Any = None


def two_rows() -> Posterior:
    ids = np.random.default_rng(0).integers(0, 9, (40, 2, 3))
    log_weights = np.random.default_rng(1).normal(size=(40, 2))
    return Posterior(
        {"middle": ids},
        log_weights,
        log_weights - 40,
        decoders={"middle": decode, "ending": decode},
        observed={"ending": np.array([[2, 5, 0], [1, 1, 0]])},
    )


@functools.cache
def full_page() -> str:
    diagnosis = Diagnosis(two_rows(), bounds=bracket(), calibration=Calibration(np.linspace(0.01, 0.99, 50)))
    parts = GapReport(gaps(2, 1), gaps(2, 3))
    return report_page(diagnosis, gaps=parts, about={"guide": "<mine>", "seed": 3}, title="A & B")


def test_the_report_has_its_parts_and_stands_alone() -> None:
    page = full_page()
    root = parse(page)
    assert root.all("p", "verdict")[0].text == Diagnosis.verdict
    assert root.all("title")[0].text == "A & B"
    statuses = [item.attributes["class"] for item in root.all("li")]
    assert statuses == ["certified", "failed", "unknown"]
    assert "KL(q‖p) is at most <i>5<s>4.9 ± 0.1→ train <u>on" in root.text
    assert "the weights0.91" in root.text
    headings = [heading.text for heading in root.all("h2")]
    assert headings == [
        "Bounds, gaps, weights",
        "Calibration",
        "Numbers",
        "Observations",
        "What the numbers mean",
        "How it was made",
    ]
    # Bounds, gaps, weights, one functional, and a tail for each row.
    assert len(root.all("svg")) == len(root.all("figure")) == 6
    assert len(root.all("table", "posterior")) == 2
    assert len(root.all("div", "tree")) == 2
    assert [part.text for part in root.all("dl", "observed")] == ["ending<b>\n.", "endingaa."]
    assert "<mine>" in root.all("dl", "about")[0].text
    # Nothing is fetched, nothing runs.
    assert not root.all("script")
    assert not root.all("link")
    assert not re.search(r'(?:src|href)="(?!#)(?!\s*data:)', page)
    assert "@import" not in page
    assert "prefers-color-scheme:dark" in page


def test_a_posterior_a_call_is_reported_as_rows_are() -> None:
    made = two_rows()
    assert report_page(Diagnosis([made.row(0), made.row(1)])) == report_page(Diagnosis(made))


def test_ids_of_the_page_are_its_own_and_what_refers_to_them_finds_them() -> None:
    page = full_page()
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    referred = set(re.findall(r'href="#([^"]*)"', page)) | set(re.findall(r"url\(#([^)]*)\)", page))
    assert len(referred) > 10
    assert referred <= set(ids)


def test_figures_take_the_pages_text_colour() -> None:
    page = full_page()
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "currentColor" in svg
    assert "#010203" not in page
    assert "#000000" not in svg
    assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', svg)


def test_a_report_without_bounds_calibration_or_rows_leaves_them_out() -> None:
    made = posterior({(1, 2, 0): [1.0] * 20, (3, 0): [2.0]}, method="smc")
    root = parse(report_page(Diagnosis(made)))
    assert root.all("h2")[0].text == "Weights"
    assert len(root.all("details", "observation")) == 1
    assert len(root.all("svg")) == 1


def test_observations_are_named_by_the_caller_and_as_many_as_rows() -> None:
    made = posterior({(1, 0): [1.0, 2.0]}, method="mcmc", num_chains=1)
    root = parse(report_page(Diagnosis(made), observations=[{"beginning": 'A "b"', "ending": "<i>"}]))
    assert root.all("dl", "observed")[0].text == 'beginningA "b"ending<i>'
    with pytest.raises(ValueError, match="observations has 1 entries, and the posterior has 2 rows"):
        report_page(Diagnosis(two_rows()), observations=[{"beginning": "A"}])


# --- command line ----------------------------------------------------------------------------------


def write(path: Path, *stories: Any) -> Path:
    path.write_text("\n".join(json.dumps(story, ensure_ascii=False) for story in stories), encoding="utf-8")
    return path


def test_stories_are_read_as_infill_takes_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl",
        {"beginning": " Tom sat.\u2028", "ending": "He left. "},
        {"beginning": "Ann ran.", "ending": "She won.", "x": 1},
    )
    assert report.read_stories(path) == [("Tom sat.", " He left."), ("Ann ran.", " She won.")]
    path = write(tmp_path / "k.jsonl", {"beginning": " Tom sat.", "keyword": " Chair "})
    assert report.read_stories(path, "keyword") == [("Tom sat.", "Chair")]
    with pytest.raises(ValueError, match='no text under "ending"'):
        report.read_stories(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no stories"),
        (b'{"beginning": "a."}', 'line 1: no text under "ending"'),
        (
            b'{"beginning": "a.", "ending": "b."}\n{"beginning": " ", "ending": "b."}',
            'line 2: no text under "beginning"',
        ),
        (b"\n[1]", 'line 2: no text under "beginning"'),
        (b"{beginning}", "line 1: no JSON"),
        (b"\xff\xfe", "no text in UTF-8"),
        (None, "no file"),
    ],
)
def test_bad_stories_are_named(
    content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "stories.jsonl"
    if content is not None:
        path.write_bytes(content)
    options = ["--program", "infilling", "--data", str(path), "--out", str(tmp_path / "r.html")]
    result = CliRunner().invoke(app, ["report", *options])
    assert result.exit_code == 2
    assert result.output.startswith("llmppl report: ")
    assert message in result.output
    assert not (tmp_path / "r.html").exists()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    for out, message in ((tmp_path / "none" / "r.html", "no folder"), (tmp_path, "is a folder")):
        result = CliRunner().invoke(app, ["report", "--out", str(out)])
        assert result.exit_code == 2
        assert message in result.output


def test_the_page_of_the_keyword_guide_is_of_held_out_pairs_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def diagnose(model: Any, guide: Any, data: Any, **options: Any) -> Diagnosis:
        asked.update(data=data, guide=type(guide).__name__)
        return Diagnosis(two_rows())

    guide = tmp_path / "mine.safetensors"
    WordGuide(keyword(tiny_lm()), tiny_lm()).save(guide)
    monkeypatch.setattr("llmppl.demo.report.diagnose", diagnose)
    monkeypatch.setattr(report.LM, "from_pretrained", lambda name: tiny_lm())
    monkeypatch.setattr(report, "_held_out", lambda program: [("Tom sat.", "chair"), ("Ann ran.", "race")])
    out = tmp_path / "r.html"
    result = CliRunner().invoke(app, ["report", str(guide), "--out", str(out), "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert asked == {"data": [("Tom sat.", "chair"), ("Ann ran.", "race")], "guide": "WordGuide"}
    assert "p(keyword | sentence)" in out.read_text(encoding="utf-8")
    monkeypatch.undo()
    held_out = report._held_out("keyword")
    assert len(held_out) == report.HELD_OUT == len(set(held_out))
    result = CliRunner().invoke(app, ["report", "--program", "poem"])
    assert result.exit_code == 2
    assert "neither keyword nor infilling" in result.output


def test_the_command_writes_the_page_of_what_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def diagnose(model: Any, guide: Any, data: Any, **options: Any) -> Diagnosis:
        asked.update(options, data=data, rank=guide.rank)
        return Diagnosis(two_rows())

    lm = tiny_lm()
    adapter = tmp_path / "mine.safetensors"
    demo.make_guide(infilling(lm), lm).save(adapter)
    monkeypatch.setattr("llmppl.demo.report.diagnose", diagnose)
    monkeypatch.setattr(report.LM, "from_pretrained", lambda name: tiny_lm())
    path = write(
        tmp_path / "s.jsonl",
        {"beginning": "Tom <sat>.", "ending": "He left."},
        {"beginning": "Ann ran.", "ending": "She won."},
    )
    out = tmp_path / "r.html"
    options = ["--data", str(path), "--out", str(out), "--samples", "7", "--seed", "5", "--threads", "1"]
    result = CliRunner().invoke(app, ["report", str(adapter), "--program", "infilling", *options])
    assert result.exit_code == 0, result.output
    assert asked == {
        "data": [("Tom <sat>.", " He left."), ("Ann ran.", " She won.")],
        "num_samples": 7,
        "simulations": 8,
        "vectorize_data": True,
        "seed": 5,
        "rank": demo.RANK,
    }
    root = parse(out.read_text(encoding="utf-8"))
    assert root.all("dl", "observed")[0].text == "beginningTom <sat>.endingHe left."
    about = root.all("dl", "about")[0].text
    assert "mine.safetensors" in about
    assert "s.jsonl" in about
    assert Diagnosis(two_rows()).verdict in result.output
