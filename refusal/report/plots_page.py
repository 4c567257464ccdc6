"""`dvc plots show` without a network: a page template that holds vega, vega-lite and vega-embed itself.

`python -m refusal.report.plots_page FILE` writes it; `dvc config plots.html_template FILE` (relative to .dvc) makes DVC use it.
The scripts come from the pinned package vl-convert-python, so the repository holds no copy of them.
"""

import sys
from pathlib import Path

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Plots</title>
{{refresh_tag}}
<script>(() => {{ {scripts} }})();</script>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; margin: 1.5rem; background: #fff; }}
/* One plot a row; a wide one scrolls by itself, not the page. */
body > div.vega-embed {{ display: block; width: fit-content; max-width: 100%; overflow-x: auto; margin-bottom: 2rem; }}
</style>
</head>
<body>
<h1>Plots</h1>
{{plot_divs}}
</body>
</html>
"""


def plots_page() -> str:
    """The template, with DVC's own placeholders left in it and its address of scripts on a public server left out."""
    from vl_convert import javascript_bundle

    # "</script" inside a string of the bundle would end the element.
    bundle = javascript_bundle()  # type: ignore[call-arg]  # its stub misses the default
    return PAGE.format(scripts=bundle.replace("</script", "<\\/script"))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(plots_page(), encoding="utf-8")
