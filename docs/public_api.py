"""A hook of MkDocs that puts an entry for each public function and class into api.md."""

import rwkvinside

PLACE = "<!-- public names -->"


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace the comment in api.md with a mkdocstrings directive for each name."""
    public = [getattr(rwkvinside, name) for name in rwkvinside.__all__ if name != "__version__"]
    entries = (f"::: {each.__module__}.{each.__qualname__}" for each in public)
    return markdown.replace(PLACE, "\n\n".join(entries))
