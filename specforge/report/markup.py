"""HTML and SVG by function calls. Whatever is not itself made here is escaped, so that no text of a run can become markup."""

from markupsafe import Markup, escape

__all__ = ["Markup", "element", "join"]

Child = str | Markup | None
Attribute = str | float | bool | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Markup:
    """`<tag ...>children</tag>`; None is left out. `class_` is `class`, other underscores are hyphens, True is a bare attribute."""
    words = [tag]
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(_short(value))}"')
    return Markup("<{}>{}</{}>").format(Markup(" ".join(words)), join(*children), Markup(tag))


def join(*children: Child) -> Markup:
    return Markup("").join(escape(child) for child in children if child is not None)


def _short(value: str | float) -> str:
    """A coordinate to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
