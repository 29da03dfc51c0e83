"""The page of real answers: accepted drafts in the run's colour, the target's own tokens plain."""

from collections.abc import Sequence
from typing import Any

from specforge import files
from specforge.errors import CheckpointError
from specforge.report.markup import Markup, element, join
from specforge.report.panel import EVALUATE, missing, tabs
from specforge.report.run import Run

_FIELDS: dict[str, Any] = {"id": str, "domain": str, "prompt": str, "first": str, "rounds": list}
_ROUND: dict[str, Any] = {"accepted": list, "own": str, "refused": str}


def text_panels(runs: Sequence[Run]) -> list[Markup]:
    told = [(number, run) for number, run in enumerate(runs) if run.record and run.record.texts]
    if not told:
        return [missing("Answers", "No evaluation was kept.", EVALUATE)]
    meaning = (
        "Held-out answers as a greedy chain decoder says them: underlined tokens were drafted and accepted, plain ones are the "
        "target's own, an upright line begins a round."
    )
    toggle = element("button", "Show what was drafted wrongly", type="button", aria_pressed="false", data_refusals=True)
    panes = [(run.name, _answers(run, number)) for number, run in told]
    return [element("figure", element("figcaption", meaning), toggle, tabs("texts", "Runs", panes), class_="texts")]


def _answers(run: Run, number: int) -> Markup:
    assert run.record is not None
    return join(*(_answer(text, number, f"{run.folder}: a text of evaluation {run.checkpoint}") for text in run.record.texts))


def _answer(text: Any, number: int, where: str) -> Markup:
    files.check_fields(text, where, CheckpointError, **_FIELDS)
    for each in text["rounds"]:
        files.check_fields(each, f"{where}, a round", CheckpointError, **_ROUND)
    accepted = sum(len(each["accepted"]) for each in text["rounds"])
    own = sum(bool(each["own"]) for each in text["rounds"])
    per_round = f"{(accepted + own) / len(text['rounds']):.2f} tokens per round" if text["rounds"] else "no round"
    head = " · ".join(word for word in (text["domain"], text["id"], per_round, f"{accepted} accepted") if word)
    prompt = element("details", element("summary", "the prompt"), element("pre", text["prompt"]))
    first = element("span", text["first"], class_="own", data_tip="the target's, before any round")
    answer = element("pre", first, *map(_round, text["rounds"]), class_="answer")
    return element("article", element("h4", head), prompt, answer, class_=f"answer-of r{number}")


def _round(each: dict[str, Any]) -> Markup:
    drafted = (element("span", str(piece), class_="drafted") for piece in each["accepted"])
    said = f"the draft said {each['refused']!r}" if each["refused"] else "no draft for this token"
    own = element("span", each["own"], class_="own", data_tip=said, data_refused=each["refused"] or None) if each["own"] else None
    return element("span", *drafted, own, class_="round")
