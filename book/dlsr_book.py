"""What the book adds to Sphinx: labels of references as in the text, and links to terms."""

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.plain import Style
from pybtex.style.labels import BaseLabelStyle


class AuthorYearLabels(BaseLabelStyle):
    """One name, two names, or the first and "et al."; then the year, where it is known."""

    def format_labels(self, sorted_entries):
        """Yield one label for each entry."""
        for entry in sorted_entries:
            names = [" ".join(p.prelast_names + p.last_names) for p in entry.persons["author"]]
            who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
            yield ", ".join(filter(None, [who, entry.fields.get("year")]))


class AuthorYearStyle(Style):
    """Pybtex's plain style with these labels."""

    default_label_style = AuthorYearLabels


def name_terms(app, doctree):
    """Let other pages link to a term of the glossary, as in ``../glossary.md#term-AUROC``."""
    anchors = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for term in doctree.findall(nodes.term):
        anchors |= {name: (term.line, name, term.astext()) for name in term["ids"]}


def setup(app):
    """Make the style known by the name ``author_year``, and the terms by their anchors."""
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    app.connect("doctree-read", name_terms)
    return {"parallel_read_safe": True}
