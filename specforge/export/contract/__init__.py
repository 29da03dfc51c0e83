"""What SGLang 0.5.23, vLLM 0.33.0 and speculators 0.9 make of a draft folder, worked out from their layouts alone.

The second opinion on everything that `specforge.export` writes: it shares no code with the writer, so one mistake is not made twice.
`read_folder` refuses what an engine would load wrongly or ignore and names the cause; `logits` computes what the engine would.
"""
