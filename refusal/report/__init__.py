"""The study as one page: page.py makes it, page.html holds its words, charts.py draws."""
