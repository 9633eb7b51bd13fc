"""The site of these pages: ``make docs``. They are plain Markdown and read as well without it."""

project = "cdc"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # so that links to headings are checked
smartquotes = False  # of --option it would make a dash
html_theme = "furo"
html_title = "cdc"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
