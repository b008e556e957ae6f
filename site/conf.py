"""How Sphinx builds the site; `build.py` gathers what it reads and calls it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

project = "Activation steering, six ways"
project_copyright = "Apache-2.0"
extensions = ["sphinx.ext.mathjax", "myst_nb"]
# The README is the front page, between its own lines.
exclude_patterns = ["README.md", "_*.md", "reference/_*.md", "LICENSE"]
# `name` in a docstring leads to the public name if it is one, and is code if not.
default_role = "py:obj"
nitpick_ignore_regex = [("py:.*", r"[\s\S]*")]
maximum_signature_line_length = 80
add_module_names = False
highlight_language = "none"  # what pages fence without a language is for a shell, or printed
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

mathjax_path = "tex-svg.js"  # beside the pages, not from a server; `build.py` puts it there

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["static"]
html_favicon = "static/icon.svg"
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": True,
    "navbar_persistent": [],  # its search would stand above that of the side bar
    "footer_content_items": [],
}
# On GitHub the pages lead to their source and to Colab; elsewhere nobody knows the address.
if repository := os.environ.get("GITHUB_REPOSITORY"):
    html_theme_options |= {
        "repository_url": f"https://github.com/{repository}",
        "repository_branch": os.environ.get("GITHUB_REF_NAME", "main"),
        "use_repository_button": True,
        "use_source_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def setup(app) -> None:
    """Offer the source of a page, here or on GitHub, where it is a file of the tree.

    The front page and the reference are gathered from several.
    """

    def only_files_of_the_tree(app, page, template, context, doctree) -> None:
        if not (ROOT / (page + (context.get("page_source_suffix") or ""))).is_file():
            context["page_source_suffix"] = ""

    app.connect("html-page-context", only_files_of_the_tree)
