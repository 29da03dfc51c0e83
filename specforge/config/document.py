"""A configuration file as text: one plain YAML mapping, small, without tags, anchors or aliases.

A tag can ask for an object to be made, and aliases of aliases grow without bound; no setting needs either.
"""

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from specforge import files
from specforge.errors import ConfigError

_LARGEST_MIB = 1
_DEEPEST = 16


def read_document(path: Path) -> str:
    """
    Raises:
        ConfigError: the file is missing, not such a mapping, or not YAML.
    """
    where = f"configuration file {str(path)!r}"
    if not path.exists():
        raise ConfigError(f"{where}: there is no such file; give the path of a YAML file.")
    try:
        text = files.read_bytes(path, ConfigError, _LARGEST_MIB).decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = f"{where} line {event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ConfigError(f"{mark}: tags (!), anchors (&) and aliases (*) are not allowed; write the value out.")
            if depth == 0 and isinstance(event, yaml.ScalarEvent | yaml.SequenceStartEvent):
                raise ConfigError(f"{mark}: must be a mapping of sections such as `model:`; see configs/ for examples.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise ConfigError(f"{mark}: is nested more than {_DEEPEST} deep; no setting is, so correct the file.")
    except (yaml.YAMLError, UnicodeDecodeError) as cause:
        raise ConfigError(f"{where}: is not YAML ({' '.join(str(cause).split())}); correct the file.") from cause
    return text
