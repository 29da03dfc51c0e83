"""What a run will cost, before it starts: steps, tokens, memory and disk."""

from specforge.cli.continuing import horizon
from specforge.cli.inputs import Paths, captured_layers, encode, read_tables
from specforge.config import RunConfig
from specforge.config.methods import registered
from specforge.features.store import LocalFeatureStore, bytes_per_token
from specforge.training.state import TrainState


def describe(config: RunConfig) -> str:
    """A few lines of text; nothing is written and no weight of the target but its tables is read."""
    tables = read_tables(config)
    target, layers = tables.config, captured_layers(config, tables.config.num_hidden_layers)
    folder, features = Paths.of(config).features, config.features
    captured = features.source == "offline" and folder.is_dir()
    lengths = LocalFeatureStore(folder).lengths.tolist() if captured else [len(s.input_ids) for s in encode(config, "train").samples]
    steps, samples = horizon(config, len(lengths), TrainState(config.run_id))
    tokens = sum(lengths) * samples // len(lengths)
    stored_tokens = {
        "offline": sum(lengths),
        "online": 0,
        "shared": tokens if features.retain else min(tokens, tokens * features.ahead_steps // steps),
    }[features.source]
    feature_bytes = stored_tokens * bytes_per_token(len(layers), target.hidden_size, config.model.dtype, features.teacher_top_k)
    head_rows = getattr(config.method.options, "draft_vocab_size", 0) or target.vocab_size  # of the target's head, those the loss needs
    table_bytes = tables.embedding.nbytes + tables.head[0].nbytes * min(head_rows, target.vocab_size)
    parameters = registered(config.method.name).load().count_parameters(config.method.options, tables, layers)
    lines = [
        f"{'training samples':<26}{len(lengths)}, {sum(lengths)} tokens, longest {max(lengths)}",
        f"{'optimiser steps':<26}{steps} of {config.train.batch_samples} samples, about {tokens} tokens in all",
        f"{'captured layers':<26}{', '.join(map(str, layers))} of {target.num_hidden_layers} (index into hidden_states)",
        f"{'draft parameters':<26}{parameters}",
        f"{'weights and optimiser':<26}{parameters * 16 / 2**20:.0f} MiB over all ranks",
        f"{'tables of the target':<26}{table_bytes / 2**20:.0f} MiB on each rank",
        f"{'features on disk':<26}{feature_bytes / 2**20:.0f} MiB, {features.source}" + (" (there already)" if captured else ""),
        f"{'one checkpoint':<26}{parameters * 12 / 2**20:.0f} MiB",
    ]
    return "\n".join(lines)
