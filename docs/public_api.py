"""A hook of MkDocs: puts an entry for each public name of the package into api.md."""

import rwkvinside

PLACE = "<!-- public names -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the comment in api.md by mkdocstrings' directives, one a name, with where the name is defined."""
    names = [getattr(rwkvinside, name) for name in rwkvinside.__all__]
    entries = (f"::: {each.__module__}.{each.__qualname__}" for each in names)
    return markdown.replace(PLACE, "\n\n".join(entries))
