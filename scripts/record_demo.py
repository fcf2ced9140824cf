"""Record the demo as an animated picture for the README.

Usage:
    .venv/bin/python scripts/record_demo.py

The lines of a real run come up from below, at their own times. No recorder is in use since those for Python are
unmaintained, and the demo prints plain lines.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "demo.svg"
COLUMNS, ROWS = 108, 22
WIDTH, HEIGHT = 7.8, 18  # pixels of a character
MARGIN = 14
PAUSE = 6.0  # seconds, before it begins again
COLORS = {"publisher": "#e0af68", "consumer 1": "#7dcfff", "consumer 2": "#9ece6a", "dlq": "#f7768e"}


def record() -> list[tuple[float, str]]:
    """Run the demo and return its lines, each with the seconds since the first one."""
    lines = []
    with subprocess.Popen(
        [sys.executable, "scripts/demo.py"], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as demo:
        assert demo.stdout
        for line in demo.stdout:
            lines.append((time.monotonic(), line.rstrip()))
    if demo.returncode:
        sys.exit(f"the demo has failed: {lines[-1][1] if lines else 'no line'}")
    return [(at - lines[0][0], line) for at, line in lines]


def draw(lines: list[tuple[float, str]]) -> str:
    """Return the picture: all lines below each other, moved up behind a window of ROWS as they come."""
    seconds = lines[-1][0] + PAUSE
    up = [f"translateY({(ROWS - count) * HEIGHT}px)" for count in range(len(lines) + 1)]
    stops = "".join(f"{100 * at / seconds:.3f}%{{transform:{up[i]}}}" for i, (at, _) in enumerate(lines, 1))
    texts = "\n".join(
        f'<text y="{(i + 0.75) * HEIGHT:g}" fill="{COLORS.get(line.split(" |")[0].strip(), "#c0caf5")}">'
        f"{escape(line[:COLUMNS])}</text>"
        for i, (_, line) in enumerate(lines)
    )
    width, height = COLUMNS * WIDTH, ROWS * HEIGHT
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width + 2 * MARGIN:g} {height + 2 * MARGIN}">
<title>The demo: orders are published, received by two consumers, and reprocessed if they failed twice</title>
<style>
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; }}
#lines {{ transform: {up[-1]}; animation: come {seconds:.2f}s step-end infinite; }}
@media (prefers-reduced-motion) {{ #lines {{ animation: none; }} }}
@keyframes come {{ 0%{{transform:{up[0]}}}{stops} }}
</style>
<rect width="100%" height="100%" rx="8" fill="#1a1b26"/>
<svg x="{MARGIN}" y="{MARGIN}" width="{width:g}" height="{height}">
<g id="lines">
{texts}
</g>
</svg>
</svg>
"""


def main() -> None:
    """Record the demo."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(record()))
    print(f"{PICTURE.relative_to(ROOT)} is written")


if __name__ == "__main__":
    main()
