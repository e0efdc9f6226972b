"""The bibliography's look: entries in alphabetical order, called by their keys: [deepseek-v3]."""

from collections.abc import Iterator

from pybtex.database import Entry
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style as Unsorted
from pybtex.style.labels import BaseLabelStyle
from pybtex.style.template import field, sentence
from sphinx.application import Sphinx


class KeyLabels(BaseLabelStyle):
    """An entry is called what its source calls it: a number would mean nothing elsewhere."""

    def format_labels(self, sorted_entries: list[Entry]) -> Iterator[str]:
        return (entry.key for entry in sorted_entries)


class Style(Unsorted):
    """Entries as in LaTeX's plain style, sorted and labelled by key."""

    default_label_style = KeyLabels

    def format_title(self, e: Entry, which_field: str, as_sentence: bool = True) -> object:
        """Keep a title's capitals, which pybtex would take away."""
        title = field(which_field)
        return sentence[title] if as_sentence else title

    def sort(self, entries: list[Entry]) -> list[Entry]:
        return sorted(entries, key=lambda entry: entry.key)


def setup(app: Sphinx) -> dict[str, bool]:
    register_plugin("pybtex.style.formatting", "minids", Style)
    # an entry's anchor is its key, so that references.md#deepseek-v3 leads to it
    app.config.bibtex_cite_id = "{key}"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
