"""Sphinx settings: pages in Markdown, the interface from docstrings. `sphinx-build -W docs build/docs` makes them."""

import tomllib
from pathlib import Path

project = "fxmerge"
author = "the fxmerge authors"
settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
version = release = settings["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"fxmerge {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
exclude_patterns = ["figures"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
napoleon_use_rtype = False
