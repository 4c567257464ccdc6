"""`dvc plots show` without a network: its page's template, plots.html, with vega, vega-lite and vega-embed in it.

`python -m refusal.report.plots_page FILE` writes it; `dvc config plots.html_template FILE` (relative to .dvc) makes DVC use it.
The scripts come from the pinned package vl-convert-python, so the repository holds no copy of them.
"""

import sys
from pathlib import Path


def plots_page() -> str:
    """The template, with DVC's own placeholders left in it and its address of scripts on a public server left out."""
    from vl_convert import javascript_bundle

    # "</script" inside a string of the bundle would end the element.
    scripts = javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]  # its stub misses the default
    return Path(__file__).with_name("plots.html").read_text(encoding="utf-8").replace("SCRIPTS", scripts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(plots_page(), encoding="utf-8")
