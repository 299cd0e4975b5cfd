"""How Sphinx makes the site; ``docs/build.py`` gathers its sources first."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_ext")]

project = "FoloVLLM"
html_title = project
copyright = "FoloVLLM contributors, Apache-2.0"

extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode",
    "docstrings", "mermaid_svg", "mathml",
]  # fmt: skip
root_doc = "index"
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_math_renderer = "mathml"

# Markdown: headings have GitHub's anchors, and its mermaid fences are the directive.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "html_image", "tasklist"]
myst_fence_as_directive = ["mermaid"]
myst_links_external_new_tab = False

# Notebooks: executed where they leave nothing behind; one that fails is an error of the build.
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

# API: in the order of the file, types in the signature as they are written.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = [] if find_spec("triton") else ["triton"]
napoleon_use_ivar = True
