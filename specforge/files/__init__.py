"""How files are written and trusted here: folders that are complete or absent, locks, hashes, and readers that bound and check."""

from specforge.files.fingerprints import Fingerprints, sha256_file
from specforge.files.folders import MANIFEST, MANIFEST_FORMAT, discard, new_staging, publish, staging, sweep, sweep_all, verify
from specforge.files.lock import Lock, is_held
from specforge.files.untrusted import (
    check_fields,
    foreign,
    inside,
    is_a,
    kinds_of,
    open_tensors,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    shown,
)
from specforge.files.writing import json_line, relative_link, require_free, writable, write_bytes, write_json, write_text

__all__ = [
    "MANIFEST", "MANIFEST_FORMAT", "Fingerprints", "Lock", "check_fields", "discard", "foreign", "inside", "is_a", "is_held",
    "json_line", "kinds_of", "new_staging", "open_tensors", "parse_json", "publish", "read_bytes", "read_json", "read_object",
    "relative_link", "require_free", "sha256_file", "shown", "staging", "sweep", "sweep_all", "verify", "writable", "write_bytes",
    "write_json", "write_text",
]  # fmt: skip
