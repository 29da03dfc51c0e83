"""`specforge export --checkpoint RUN/best --to sglang --out DIR`: a draft as serving engines load it; `--check DIR` looks at one."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import CheckpointError, ConfigError


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge export",
        description="Write a draft as serving engines load it, and check what was written. The last line of the output is one JSON object.",
    )
    parser.add_argument("--checkpoint", help="RUN/best, RUN/latest or a step folder")
    parser.add_argument("--to", metavar="hf|sglang|vllm|speculators", help="layout of the folder")
    parser.add_argument("--out", help="the folder to write")
    parser.add_argument("--target", default="", help="folder of the target; default: where the training found it")
    parser.add_argument("--check", metavar="DIR", help="say whether engines load an exported folder rightly, and what is wrong if not")
    given = parser.parse_args(words)
    wanted = (given.checkpoint, given.to, given.out)
    if given.check and not any(wanted):
        print(files.json_line(_check(Path(given.check))))
        return 0
    if given.check or not all(wanted):
        raise ConfigError("give --checkpoint, --to and --out, or --check alone.")

    from specforge.export.folder import export

    record = export(read_trained(Path(given.checkpoint), given.target), given.to, Path(given.out))
    print(f"{given.out}: {record['method']} of step {record['checkpoint']['step']}, for {' and '.join(record['loaded_by'])}")
    print(files.json_line({"out": given.out, **record["verification"], "loaded_by": record["loaded_by"]}))
    return 0


def _check(folder: Path) -> dict[str, Any]:
    from specforge.export.contract.folder import read_folder

    network = read_folder(folder).network
    return {"check": str(folder), "method": network.kind, "hidden_state_ids": list(network.hidden_state_ids), "good": True}


def read_trained(path: Path, target: str) -> Any:
    """The draft of a checkpoint with all that its folder and its run know of it.

    Raises:
        CheckpointError: there is no such checkpoint, or it does not say where its target is, or does not fit it.
    """
    from specforge.cli.draft import read_draft
    from specforge.distributed import World
    from specforge.export.trained import TrainedDraft
    from specforge.features.tables import TargetConfig
    from specforge.models.calibration import FILE
    from specforge.training.run_folder import read_best, read_state, resolve

    checkpoint = resolve(path, "--checkpoint")
    state = read_state(checkpoint, World())
    settings = state["settings"]
    target_path = Path(target or settings.get("model", {}).get("target_path", ""))
    if not target_path.is_dir():
        raise CheckpointError(f"{checkpoint.path}: its target {str(target_path)!r} is not there; give its folder with --target.")
    draft = read_draft(str(checkpoint.path), target_path, None)
    best, calibration = read_best(checkpoint.path.parent), checkpoint.path / "draft" / FILE
    return TrainedDraft(
        method=draft.method,
        name=draft.method_name,
        target=TargetConfig.read(target_path),
        target_path=target_path,
        target_fingerprint=settings.get("target_fingerprint") or "",
        checkpoint=checkpoint.path.name,
        run_id=checkpoint.run_id,
        step=checkpoint.step,
        template=_template(settings, target_path),
        metrics=best.metrics if best is not None and best.checkpoint == checkpoint.path.name else {},
        calibration=calibration if calibration.exists() else None,
    )


def _template(settings: dict[str, Any], target_path: Path) -> Any:
    """The chat template that the rows were rendered with; None where there is none."""
    from transformers import AutoTokenizer

    from specforge.data.template import Encoder
    from specforge.export.trained import Template

    tokenizer_path = settings.get("model", {}).get("tokenizer_path") or str(target_path)
    if not (Path(tokenizer_path) / "tokenizer.json").exists():
        return None
    with files.foreign(Path(tokenizer_path), CheckpointError, "give the target of its training with --target"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True, trust_remote_code=False)
    chosen = settings.get("data", {}).get("chat_template", "")
    if not chosen and not tokenizer.chat_template:
        return None
    encoder = Encoder(tokenizer, max_length=4, chat_template=chosen)
    return Template(encoder.template_digest, _thinking(tokenizer, encoder.template_text))


def _thinking(tokenizer: Any, template: str) -> bool | None:
    """What a template with the switch `enable_thinking` does without being told."""
    if "enable_thinking" not in template:
        return None
    asked = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
    messages = [{"role": "user", "content": "?"}]
    plain = tokenizer.apply_chat_template(messages, **asked)
    return bool(plain == tokenizer.apply_chat_template(messages, enable_thinking=True, **asked))
