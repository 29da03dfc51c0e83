"""What a run will cost, before it starts: steps, tokens, memory and disk."""

from specforge.cli.compose import horizon
from specforge.cli.inputs import Paths, encode, read_tables
from specforge.config import RunConfig
from specforge.config.methods import registered
from specforge.features.store import LocalFeatureStore
from specforge.features.target import aux_layer_ids
from specforge.training.state import TrainState


def describe(config: RunConfig) -> str:
    """A few lines of text; nothing is written and no weight of the target but its tables is read."""
    tables = read_tables(config)
    target, layers = tables.config, aux_layer_ids(tables.config.num_hidden_layers, config.model.aux_layer_ids)
    folder = Paths.of(config).features
    lengths = LocalFeatureStore(folder).lengths.tolist() if folder.is_dir() else [len(s.input_ids) for s in encode(config, "train").samples]
    steps, samples = horizon(config, len(lengths), TrainState(config.run_id))
    tokens = sum(lengths) * samples // len(lengths)
    item_bytes = 4 if config.model.dtype == "float32" else 2
    feature_bytes = sum(lengths) * ((len(layers) + 1) * target.hidden_size * item_bytes + 13)
    parameters = registered(config.method.name).load().count_parameters(config.method.options, tables, layers)
    lines = [
        f"{'training samples':<26}{len(lengths)}, {sum(lengths)} tokens, longest {max(lengths)}",
        f"{'optimiser steps':<26}{steps} of {config.train.batch_samples} samples, about {tokens} tokens in all",
        f"{'captured layers':<26}{', '.join(map(str, layers))} of {target.num_hidden_layers} (index into hidden_states)",
        f"{'draft parameters':<26}{parameters}",
        f"{'weights and optimiser':<26}{parameters * 16 / 2**20:.0f} MiB over all ranks",
        f"{'tables of the target':<26}{2 * tables.embedding.nbytes / 2**20:.0f} MiB on each rank",
        f"{'features on disk':<26}{feature_bytes / 2**20:.0f} MiB" + (" (there already)" if folder.is_dir() else ""),
        f"{'one checkpoint':<26}{parameters * 12 / 2**20:.0f} MiB",
    ]
    return "\n".join(lines)
