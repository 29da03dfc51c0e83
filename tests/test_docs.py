"""What the pages name exists: links, files, commands, options, keys. And each block of commands is run, or says why not."""

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from specforge.cli.__main__ import COMMANDS
from specforge.config import RankingConfig, RunConfig, load_task
from specforge.config.methods import METHODS
from specforge.errors import ConfigError
from tests.doc_pages import GPU, PAGES, ROOT, Block, anchors, blocks, commands, inline_code, links, prose

BLOCKS = [block for page in PAGES for block in blocks(page)]
SECTIONS = {field.name for kind in (RunConfig, RankingConfig) for field in dataclasses.fields(kind)}
FILES = (".csv", ".json", ".jsonl", ".md", ".py", ".safetensors", ".sbatch", ".yaml")


class Parsed(Exception):  # noqa: N818
    """Thrown when a command has read its words and would begin to work."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        self.namespace = namespace


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a program's own parser makes of its words; the program does not begin. Wrong words are a SystemExit."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def stop(self: argparse.ArgumentParser, words: Any = None, namespace: Any = None, original: Any = original) -> None:
            raise Parsed(original(self, words, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)

    def parsed(words: Sequence[str]) -> argparse.Namespace:
        program, arguments = program_of(words)
        with pytest.raises(Parsed) as thrown:
            if program == "specforge":
                assert arguments[0] in COMMANDS, f"specforge {arguments[0]}: no such command"
                importlib.import_module(f"specforge.cli.{arguments[0]}").run(arguments[1:])
            else:
                monkeypatch.setattr(sys, "argv", [program, *arguments])
                importlib.import_module(program).main()
        return thrown.value.namespace

    return parsed


def program_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """The module that a command line runs and the words that it is given; "" for programs of others, and scripts without words."""
    first, rest = words[0], list(words[1:])
    if first == "specforge":
        return "specforge", rest
    if "-m" in words and words[words.index("-m") + 1].startswith("specforge"):
        at = words.index("-m") + 1
        return words[at], list(words[at + 1 :])
    if first == "sbatch":
        assert rest[1] == "scripts/train.sbatch"
        return "specforge", ["train", *rest[3:]]
    if not first.startswith("scripts/"):
        return "", []
    script = (ROOT / first).read_text()
    runs = re.search(r'-m (specforge\S*) ?(\w*) "\$@"|from (specforge\S*) import main', script)
    return (runs[1] or runs[3], [word for word in [runs[2]] if word] + rest) if runs else ("", [])


def validate(namespace: argparse.Namespace) -> None:
    """Load the configuration that a command names, or, if the reader is to write it, what the command changes of one."""
    if not getattr(namespace, "config", None):
        return
    path = ROOT / namespace.config
    given = [] if path.is_file() else ["model.target_path=T", "data.train_path=D", "output_dir=R"]
    load_task(path if path.is_file() else None, [*given, *namespace.overrides])


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "bash"], ids=lambda block: block.place)
def test_commands_of_a_block_parse(block: Block, parse: Any) -> None:
    for words in commands(block.text):
        if program_of(words)[0]:
            validate(parse(words))


def test_a_block_of_commands_is_run_or_needs_a_gpu() -> None:
    wrong = []
    for block in [block for block in BLOCKS if block.language == "bash"]:
        if not (block.mark in ("", GPU) or block.smaller or block.run_by):
            wrong.append(f"{block.place}: the mark {block.mark!r} is none of {GPU}, `smaller: A to B` or `run by FILE`")
        if any(word not in block.text.split() for word in block.smaller):
            wrong.append(f"{block.place}: {block.smaller} has words that the block has not")
        if block.run_by:
            runner = (ROOT / block.run_by).read_text()
            wrong += [f"{block.place}: {block.run_by} has no {name}" for name in map(run_name, commands(block.text)) if name not in runner]
    assert wrong == []


def run_name(words: Sequence[str]) -> str:
    """The word by which what runs a command must name it: a script, a module, or what `specforge` is to do."""
    if script := next((word for word in words[:3] if word.startswith("scripts/")), ""):
        return Path(script).name
    program, arguments = program_of(words)
    return arguments[0] if program == "specforge" else program


def test_commands_stand_in_blocks_of_bash() -> None:
    """In any other block, and in those by indentation, nobody would look for them."""
    begins = r"(?:specforge|torchrun|sbatch|python -m|scripts/\w+\.sh) .+"
    wrong = [block.place for block in BLOCKS if block.language != "bash" and re.search(f"^{begins}", block.text, flags=re.MULTILINE)]
    wrong += [f"{page.name}: {line}" for page in PAGES for line in re.findall(f"^ {{4,}}({begins})", prose(page), flags=re.MULTILINE)]
    assert wrong == []


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.place)
def test_a_configuration_is_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(block.text)
    load_task(tmp_path / "my.yaml", [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading; there are {sorted(anchors(target))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_options_and_keys_in_the_text_exist(page: Path, parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for code in inline_code(page):
        if re.match(r"^(specforge|tests|scripts|docs|configs)/[\w./-]+$", code) and not (ROOT / code).exists():
            wrong.append(f"`{code}`: there is no such file")
        key = re.match(r"^(\w+)\.([a-z_0-9]+(?:\.[a-z_0-9]+)*)(?=$|=|: )", code)
        if key and key[1] in SECTIONS and not code.endswith(FILES) and not is_key(key[0].split(".")):
            wrong.append(f"`{code}`: there is no such key")
        if command := re.match(r"^(?:torchrun .*-m )?specforge ((?:bench )?[a-z-]+)", code):
            unknown = set(re.findall(r"(?<= )--[a-z][a-z-]*", code[command.end() :])) - options_of(command[1], parse, capsys)
            wrong += [f"`{code}`: there is no {option}" for option in unknown]
    assert wrong == []


def is_key(parts: list[str]) -> bool:
    """Whether a section, subsection or value of that name exists in either kind of run."""
    if parts[:2] == ["method", "options"]:
        return len(parts) == 2 or any(parts[2] in names(entry.options) for entry in METHODS.values())
    return any(
        parts[0] in names(kind) and (len(parts) == 1 or parts[1] in names(type(section_of(kind, parts[0]))))
        for kind in (RunConfig, RankingConfig)
    )


def names(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()


def section_of(kind: Any, name: str) -> Any:
    field = next(field for field in dataclasses.fields(kind) if field.name == name)
    return field.default_factory() if callable(field.default_factory) else field.default


def options_of(command: str, parse: Any, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        parse(["specforge", *command.split(), "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))


@pytest.mark.parametrize(
    "words",
    [
        "specforge eval my.yaml --checkpoint runs/mine/best --alive 60",
        "specforge evaluate my.yaml",
        "specforge train my.yaml train.stepz=1",
        "torchrun --nproc-per-node=8 -m specforge train my.yaml features.source=disk",
        "sbatch --nodes=4 scripts/train.sbatch RUN my.yaml train.step=3",
        "scripts/prefix_demo.sh --exmples 3",
        "python -m specforge.demo.rows --train few PROMPTS.jsonl",
        "scripts/nothing.sh",
    ],
)
def test_a_wrong_command_is_found(words: str, parse: Any) -> None:
    with pytest.raises((SystemExit, AssertionError, ConfigError, FileNotFoundError)):
        validate(parse(words.split()))
