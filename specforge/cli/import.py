"""`specforge import DIR --target TARGET --out RUN`: an EAGLE-3 or DFlash draft of others as a checkpoint of this program."""

# ruff: noqa: N999
import argparse
from collections.abc import Sequence
from pathlib import Path


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge import",
        description="Read a draft in a layout of serving engines: to measure it (eval, generate), or to train on (model.draft_path). "
        "The last line of the output is one JSON object.",
    )
    parser.add_argument("folder", help="config.json and safetensors of an EAGLE-3 or DFlash draft")
    parser.add_argument("--target", required=True, help="folder of the target that it drafts for")
    parser.add_argument("--out", required=True, help="a run folder to put the checkpoint into")
    parser.add_argument("--draft-tokens", type=int, help="drafts that EAGLE-3 was trained for, where the folder does not say")
    given = parser.parse_args(words)

    from specforge import files
    from specforge.errors import ConfigError
    from specforge.export.checkpoint import write_checkpoint
    from specforge.export.reading import read_layout
    from specforge.features.tables import TargetTables

    if given.draft_tokens is not None and given.draft_tokens < 1:
        raise ConfigError(f"--draft-tokens {given.draft_tokens}: must be at least 1; give the steps of its training.")
    target = Path(given.target)
    imported = read_layout(Path(given.folder), TargetTables.read(target), given.draft_tokens)
    path = write_checkpoint(imported, target, Path(given.out))
    print(f"{path}: a draft of method {imported.name}; its options are {imported.options}")
    print(files.json_line({"checkpoint": str(path), "method": imported.name}))
    return 0
