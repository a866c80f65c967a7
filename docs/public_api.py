"""A hook of MkDocs: puts an entry for each public name of the package into api.md."""

import rwkvinside

PLACE = "<!-- public names -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the comment in api.md by mkdocstrings' directives, one a name, with where the name is defined."""
    values = [getattr(rwkvinside, name) for name in rwkvinside.__all__]
    entries = (f"::: {value.__module__}.{value.__qualname__}" for value in values if callable(value))
    return markdown.replace(PLACE, "\n\n".join(entries))
