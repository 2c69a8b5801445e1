"""The documentation site: ``make docs``. Warnings are errors."""

import sa_softmax

project = "sa-softmax"
author = "The sa-softmax developers"
release = version = sa_softmax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "figures", "conformance"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures have them; descriptions say shapes
napoleon_use_rtype = False

html_theme = "furo"
html_title = "sa-softmax"
html_theme_options = {"navigation_with_keys": True}
