"""From conversations to what a step consumes: rows are read and split (`conversations`), rendered and tokenised with a mask of
the answers (`answers`, `template`), visited in one global order (`order`), packed into micro-batches (`packing`) and counted
into the draft's vocabulary (`vocabulary`). Everything here is NumPy and deterministic; no module knows of features or models.
"""
