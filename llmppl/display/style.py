"""The look of what is shown as HTML, on light and on dark ground, in a notebook and on a phone."""

from __future__ import annotations

_TINTS = (0.12, 0.22, 0.33, 0.45)
"""Opacities of the token colours: over white and over black the text on them keeps its contrast."""

_UPS = "".join(
    f".llmppl .up{n}{{background:rgba(40,125,230,{tint});border-bottom:{max(n - 1, 1)}px solid rgb(60,135,220)}}"
    for n, tint in enumerate(_TINTS, 1)
)
_DOWNS = "".join(
    f".llmppl .down{n}{{background:rgba(225,115,30,{tint});border-bottom:{max(n - 1, 1)}px dashed rgb(215,115,40)}}"
    for n, tint in enumerate(_TINTS, 1)
)

# No ground and no text colour of its own: a fragment takes those of the notebook around it.
_FRAGMENT = """
.llmppl{font-size:14px;line-height:1.5;overflow-wrap:anywhere}
.llmppl table{border-collapse:collapse;margin:.5em 0;font-variant-numeric:tabular-nums}
.llmppl caption,.llmppl .caption{text-align:left;font-size:.9em;opacity:.8;margin:.3em 0}
.llmppl th,.llmppl td{padding:.25em .6em;text-align:right;vertical-align:top;white-space:nowrap;
 border-bottom:1px solid rgba(128,128,128,.3);background:none}
.llmppl th{font-weight:600}
.llmppl td.text,.llmppl th.text{text-align:left;white-space:normal;min-width:11em}
.llmppl .marked,.llmppl .scores td.text{white-space:pre-wrap}
.llmppl .legend{font-size:.85em}
.llmppl .key{white-space:nowrap}
.llmppl .key span{padding:0 .3em}
.llmppl summary{cursor:pointer}
.llmppl table.posterior summary{list-style-position:outside;margin-left:1em}
.llmppl .bar{display:block;height:5px;min-width:2.5em;background:rgba(128,128,128,.2);border-radius:2px}
.llmppl .bar i{display:block;height:100%;background:rgb(90,140,190);border-radius:2px}
.llmppl.tree details>div{margin-left:.35em;padding-left:.65em;border-left:1px solid rgba(128,128,128,.4)}
.llmppl.tree details.deep>div{margin-left:0;padding-left:.15em}
.llmppl.tree .leaf{padding-left:1.1em}
.llmppl.tree .more,.llmppl .ends{opacity:.8;font-style:italic}
.llmppl.tree .line{display:inline-flex;gap:.7em;width:calc(100% - 1.3em);vertical-align:top}
.llmppl table.scores{font-size:.9em;margin-left:1em}
.llmppl table.scores td.text{min-width:4em}
@media (max-width:600px){.llmppl th,.llmppl td{padding:.25em .35em}
 .llmppl table.posterior,.llmppl table.posterior>*{display:block}
 .llmppl table.scores{margin-left:0}
 .llmppl table.posterior>*>tr{display:grid;grid-template-columns:5em 5em 1fr;border-bottom:1px solid
 rgba(128,128,128,.3)}
 .llmppl table.posterior>*>tr>*{border-bottom:0}
 .llmppl table.posterior>tbody>tr>td.text{grid-column:1/-1}}
.llmppl.tree .mass{flex:none;width:3.6em;text-align:right;font-size:.85em;font-variant-numeric:tabular-nums}
"""

FRAGMENT = f"<style>{_FRAGMENT}{_UPS}{_DOWNS}</style>"
"""Goes in front of every piece that can stand alone; twice does no harm."""

PAGE = (
    """
:root{color-scheme:light dark;--ground:#fff;--card:#f4f5f7;--ink:#1b1e23;--soft:#565d68;--line:#d5d9df;--link:#1a5fb4;
 --certified:#1a7340;--suggested:#855a00;--failed:#b3261e;--unknown:#565d68}
@media (prefers-color-scheme:dark){:root{--ground:#14171c;--card:#1e232b;--ink:#e7eaee;--soft:#a5adb8;--line:#363d48;
 --link:#7ab4ff;--certified:#6fd08f;--suggested:#f0c060;--failed:#ff8f86;--unknown:#a5adb8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 4rem;max-width:64rem;background:var(--ground);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.4em 0}
h2{font-size:1.2rem;margin:2em 0 .4em;padding-top:.6em;border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.4em 0 .3em}
a{color:var(--link)}
code{overflow-wrap:anywhere}
.soft{color:var(--soft)}
.verdict{background:var(--card);border-radius:8px;padding:1rem 1.2rem;font-size:1.15rem}
.findings{list-style:none;margin:1rem 0;padding:0}
.findings li{border-left:4px solid;padding:.1rem 0 .1rem .8rem;margin:.7rem 0}
.findings p{margin:.15rem 0;color:var(--ink)}
.findings .advice{color:var(--soft)}
.status{font-size:.8rem;font-weight:700;letter-spacing:.04em;text-transform:uppercase}
.certified{border-color:var(--certified);color:var(--certified)}
.suggested{border-color:var(--suggested);color:var(--suggested)}
.failed{border-color:var(--failed);color:var(--failed)}
.unknown{border-color:var(--unknown);color:var(--unknown)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));gap:1rem}
figure{margin:.6rem 0;max-width:36rem}
figure svg{display:block;width:100%;height:auto}
figcaption{font-size:.85rem;color:var(--soft)}
.scroll{overflow-x:auto}
.observed{background:var(--card);border-radius:8px;padding:.6rem 1rem;margin:.5rem 0;overflow-wrap:anywhere}
.observed dt,.about dt{font-size:.8rem;color:var(--soft)}
.observed dd,.about dd,.glossary dd{margin:0 0 .5rem;overflow-wrap:anywhere}
.observed dd{white-space:pre-wrap}
.glossary dt{font-weight:600}
.observation>summary{cursor:pointer;font-weight:600;padding:.4rem 0}
"""
    + _FRAGMENT
    + _UPS
    + _DOWNS
)
"""The style of a whole page."""
