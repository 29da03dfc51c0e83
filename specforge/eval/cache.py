"""Evaluation features, produced once and found again by what they were made of.

An entry is a folder named by its key, the SHA-256 of the JSON-encoded identity: the fields of the evaluation set, the
content of the files they name, and how features are stored. Entries are complete or absent and carry their checksums.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specforge import files
from specforge.config.schema import EvalConfig
from specforge.distributed.world import World
from specforge.errors import ConfigError, FeatureError
from specforge.features.rendezvous import Rendezvous
from specforge.features.store import STORE_FORMAT

META = "eval_cache_meta.json"
CACHE_FORMAT = 1
_PATH_FIELDS = ("eval_data_path", "target_path", "tokenizer_path", "chat_template")
_log = logging.getLogger(__name__)


class EvalCache:
    """The entries below `root`. Contents of unchanged files are hashed once and remembered there."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._fingerprints = files.Fingerprints(self.root / ".fingerprints.json")

    @classmethod
    def for_config(cls, config: EvalConfig) -> "EvalCache":
        """The cache below `config.cache_dir`; raises ConfigError where that is empty."""
        if not config.cache_dir:
            raise ConfigError("cache_dir='': the evaluation cache needs a folder; set features.cache_dir.")
        return cls(config.cache_dir)

    def identity(self, config: EvalConfig) -> dict[str, Any]:
        """What the key is the hash of. A path that is not there has no content: its fingerprint is empty."""
        fields = config.identity_fields()
        contents = {name: self._fingerprints.fingerprint(Path(fields[name])) if fields[name] else "" for name in _PATH_FIELDS}
        return {
            "fields": fields,
            "contents": contents,
            "feature_dtype": config.feature_dtype,
            "mask_options": [list(option) for option in config.mask_options],
            "format": [CACHE_FORMAT, STORE_FORMAT],
        }

    def key(self, config: EvalConfig) -> str:
        return _digest(self.identity(config))

    def get_or_produce(self, config: EvalConfig, produce: Callable[[Path], object], world: World | None = None) -> Path:
        """The entry of `config`; where there is none, or a damaged one, `produce(staging_dir)` writes its files first.

        Of many processes that ask at once, one produces and the others poll the lock of the entry. With a `world` of several
        ranks all of them call this, and all call `produce` with the same staging folder, so it may use collectives. Rank 0
        alone looks, locks and publishes; the others learn its verdict by polling a file, since it may wait for hours.

        Raises:
            FeatureError: `produce` wrote nothing, nothing can be written, or another rank failed or died.
        """
        with files.writable(self.root, FeatureError), Rendezvous(self.root, world or World()) as meeting:
            if meeting.world.is_main:
                return self._decide(config, produce, meeting)
            staging_dir = meeting.hear("staging")
            if staging_dir:
                produce(Path(staging_dir))
                meeting.meet("produced")
            return Path(meeting.hear("entry"))

    def try_get(self, config: EvalConfig) -> Path | None:
        """The entry of `config` if there is an undamaged one."""
        entry = self.root / self.key(config)
        return entry if self._is_intact(entry) else None

    def invalidate(self, config: EvalConfig) -> bool:
        """Remove the entry of `config`; returns whether there was one."""
        key = self.key(config)
        with self._lock(key):
            there = os.path.lexists(self.root / key)
            if there:
                files.discard(self.root / key)
        return there

    def _decide(self, config: EvalConfig, produce: Callable[[Path], object], meeting: Rendezvous) -> Path:
        identity = self.identity(config)
        key = _digest(identity)
        entry = self.root / key
        with meeting.holding(self._lock(key)):
            if self._is_intact(entry):
                meeting.tell("staging", None)
            else:
                self._produce(entry, identity, produce, meeting)
        meeting.tell("entry", str(entry))
        return entry

    def _produce(self, entry: Path, identity: dict[str, Any], produce: Callable[[Path], object], meeting: Rendezvous) -> None:
        if os.path.lexists(entry):
            files.discard(entry)
        files.sweep(entry)
        notes = {"key": entry.name, "identity": identity}
        with files.staging(entry, manifest_name=META, notes=notes) as staging_dir, contextlib.ExitStack() as first:
            first.push(meeting.tell_failure)
            meeting.tell("staging", str(staging_dir))
            produce(staging_dir)
            meeting.meet("produced")
            if not any(staging_dir.iterdir()):
                raise FeatureError(
                    f"evaluation features {entry.name}: produce() wrote nothing into the folder it was given; let it write there."
                )

    def _is_intact(self, entry: Path) -> bool:
        if not os.path.lexists(entry):
            return False
        try:
            if entry.is_symlink() or not entry.is_dir():
                raise FeatureError(f"{entry}: must be a folder of its own; it is a file or a link.")
            files.verify(entry, FeatureError, manifest_name=META, fingerprints=self._fingerprints)
        except FeatureError as damage:
            _log.warning("evaluation features are damaged and will be produced again: %s", damage)
            return False
        return True

    def _lock(self, key: str) -> files.Lock:
        return files.Lock(self.root / f".{key}.lock")


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
