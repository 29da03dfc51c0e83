"""Every recipe loads, fits the target that it is named after, and trains a small target of the same family."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from specforge.cli.__main__ import main
from specforge.cli.inputs import captured_layers
from specforge.config import dump_config, load_config, load_task
from specforge.config.methods import METHODS, registered
from specforge.data.vocabulary import DraftVocabulary
from specforge.demo import target_report
from specforge.errors import ConfigError
from specforge.features.store import FeatureMeta
from specforge.features.tables import TargetConfig, TargetTables
from specforge.features.target import Target, aux_layer_ids
from specforge.log.run_log import read_metrics
from specforge.methods.eagle3 import Eagle3, derive_config
from specforge.models.draft_folder import read_draft_config
from specforge.models.eagle3 import Eagle3Draft
from specforge.training.run_folder import resolve
from tests.texts import make_text_target, write_rows

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
LINE = "the command line"
EMBEDDED = {path.stem.removesuffix("-embedded"): path for path in CONFIGS if path.stem.endswith("-embedded")}
EMBEDDED_TARGET = Path(target_report.__file__).parent / "target"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_loads_and_survives_its_dump(path: Path, tmp_path: Path) -> None:
    config = load_task(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_task(again) == config


def test_words_win_over_the_file() -> None:
    config = load_config(CONFIGS[0], ["train.steps=7", "model.aux_layer_ids=[1,3]"])
    assert (config.train.steps, config.model.aux_layer_ids) == (7, (1, 3))


@pytest.mark.parametrize("rate", ["0", "1.01", "1e38", ".nan"])
def test_a_learning_rate_that_no_draft_survives_is_refused(rate: str) -> None:
    assert load_config(CONFIGS[0], ["train.learning_rate=1"]).train.learning_rate == 1
    with pytest.raises(ConfigError, match=r"train\.learning_rate=.*must be positive and at most 1"):
        load_config(CONFIGS[0], [f"train.learning_rate={rate}"])


def test_a_word_without_a_value_is_empty_text() -> None:
    assert load_config(CONFIGS[0], ["data.eval_path="]).data.eval_path == ""


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("", ["train.stepps=5"], f"train.stepps=5 on {LINE}: there is no such key; train.steps may be meant."),
        ("train: {stepps: 5}", [], "train.stepps=5 in c.yaml: there is no such key; train.steps may be meant."),
        (
            "", ["steps=5"],
            f"steps=5 on {LINE}: there is no such key; train.steps may be meant; sections and keys are run_id, output_dir, seed, "
            "model, method, data, features, train, checkpoint, eval, log.",
        ),
        (
            "", ["draft_tokens=5"],
            f"draft_tokens=5 on {LINE}: there is no such key; method.options.draft_tokens or eval.draft_tokens may be meant; "
            "sections and keys are run_id, output_dir, seed, model, method, data, features, train, checkpoint, eval, log.",
        ),
        ("", ["log.x=5"], f"log.x=5 on {LINE}: there is no such key; keys of log are wandb, wandb_project."),
        ("", ["method.options.los=kl"], f"method.options.los='kl' on {LINE}: there is no such key; method.options.loss may be meant."),
        ("log: online", [], "log='online' in c.yaml: is a section; write log.KEY=VALUE, where KEY is one of wandb, wandb_project."),
        ("", ["train.steps=many"], f"train.steps='many' on {LINE}: must be a whole number; the default is 0."),
        ("train: {steps: 3}", ["train.steps="], f"train.steps='' on {LINE}: must be a whole number; the default is 0."),
        ("data:\n  eval_path:", [], "data.eval_path without a value in c.yaml: must be text; the default is ''."),
        ("train: {profile: x}", [], "train.profile='x' in c.yaml: must be true or false; the default is False."),
        ("log: {wandb: on}", [], "log.wandb=True in c.yaml: must be one of disabled, offline, online; the default is 'disabled'."),
        ("", ["model.aux_layer_ids=[a]"], f"model.aux_layer_ids=['a'] on {LINE}: must be a list such as [1,2]; the default is []."),
        ("", ["model.aux_layer_ids={a: 1}"], f"model.aux_layer_ids={{'a': 1}} on {LINE}: must be a list such as [1,2]; the default is []."),
        ("output_dir: [x]", [], "output_dir=['x'] in c.yaml: must be text; it has no default."),
        ("", [], "output_dir: must be given; write it into c.yaml, or output_dir=VALUE on the command line."),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_named(
    text: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config("c.yaml", words)
    assert str(refused.value) == message


@dataclass(frozen=True)
class Family:
    """A published target, and what follows from it by hand."""

    recipe: str
    config: PretrainedConfig
    rotary: type[torch.nn.Module]
    eos_token_ids: tuple[int, ...]
    aux_layer_ids: tuple[int, ...]
    """(2, n//2, n-3)."""
    bytes_per_token: int
    """4 hidden states (3 captured, 1 last) of 2 bytes a number; ids 4, mask 1, arg-max 4, log-sum-exp 4."""
    parameters: int
    cut_down: dict[str, Any]
    """What makes a narrow target of seven layers of the same family."""

    @property
    def path(self) -> Path:
        return next(path for path in CONFIGS if path.stem == self.recipe)


NARROW: dict[str, Any] = {
    "num_hidden_layers": 7,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LLAMA_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
FAMILIES = [
    Family(
        "eagle3-llama-3.1-8b",
        LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
            vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, bos_token_id=128000, eos_token_id=128009,
            rope_parameters=LLAMA_ROPE,
        ),
        LlamaRotaryEmbedding, (128001, 128008, 128009), (2, 16, 29), 4 * 4096 * 2 + 13,
        # fc 3H*H; q 2H*32*128; k and v 2 * 2H*8*128; o 32*128*H; feed-forward 3*H*14336; four norms of H; head 32000*H
        3 * 4096**2 + 2 * 4096 * 4096 + 4 * 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 14336 + 4 * 4096 + 32000 * 4096,
        {**NARROW, "num_attention_heads": 4, "head_dim": 8},
    ),
    Family(
        "eagle3-qwen3-8b",
        Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
            vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, bos_token_id=151643, eos_token_id=151645,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        Qwen3RotaryEmbedding, (151645, 151643), (2, 18, 33), 4 * 4096 * 2 + 13,
        # as above with a feed-forward of 12288; the target's query and key norms are not part of the draft
        3 * 4096**2 + 2 * 4096 * 4096 + 4 * 4096 * 1024 + 4096 * 4096 + 3 * 4096 * 12288 + 4 * 4096 + 32000 * 4096,
        {**NARROW, "num_attention_heads": 4, "head_dim": 8},
    ),
    Family(
        "eagle3-qwen3-30b-a3b",
        Qwen3MoeConfig(
            hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
            rms_norm_eps=1e-6, bos_token_id=151643, eos_token_id=151645, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        Qwen3MoeRotaryEmbedding, (151645, 151643), (2, 24, 45), 4 * 2048 * 2 + 13,
        # queries 32*128 = 4096 wide and keys 4*128 = 512, both from 2H = 4096; feed-forward 6144
        3 * 2048**2 + 4096 * 4096 + 2 * 4096 * 512 + 4096 * 2048 + 3 * 2048 * 6144 + 4 * 2048 + 32000 * 2048,
        {**NARROW, "num_attention_heads": 4, "head_dim": 16, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "eagle3-gpt-oss-20b",
        GptOssConfig(
            hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4, num_hidden_layers=24,
            num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088, max_position_embeddings=131072,
            rms_norm_eps=1e-5, sliding_window=128, eos_token_id=200002, pad_token_id=199999, rope_parameters=OSS_ROPE,
        ),
        GptOssRotaryEmbedding, (200002, 199999, 200012), (2, 12, 21), 4 * 2880 * 2 + 13,
        # queries 64*64 = 4096 wide and keys 8*64 = 512, both from 2H = 5760; feed-forward 4 * 2880
        3 * 2880**2 + 5760 * 4096 + 2 * 5760 * 512 + 4096 * 2880 + 3 * 2880 * 11520 + 4 * 2880 + 32000 * 2880,
        {**NARROW, "num_attention_heads": 4, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
]  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.recipe.removeprefix("eagle3-"))


def test_every_recipe_of_a_real_target_is_here() -> None:
    assert {family.path for family in FAMILIES} == {path for path in CONFIGS if path.stem.startswith("eagle3-")} - {EMBEDDED["eagle3"]}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe_of_the_embedded_target(name: str) -> None:
    recipe, target = load_config(EMBEDDED[name]), TargetConfig.read(EMBEDDED_TARGET)
    assert recipe.method.name == name
    layers = captured_layers(recipe, target.num_hidden_layers)
    assert registered(name).load().count_parameters(recipe.method.options, TargetTables.read(EMBEDDED_TARGET), layers) > 0


@pytest.mark.parametrize(
    ("name", "block_size", "parameters_of_heads"),
    [
        ("dflash", 16, 0),
        # a unit of 1024 that reads H, a squeeze of both to 256, and from there to the vocabulary
        ("domino", 16, 3 * 1024 * (4096 + 1024) + 256 * (4096 + 1024) + 151936 * 256),
        # two tables of rank 256; the confidence reads H and 256
        ("dspark", 7, 2 * 151936 * 256 + 4096 + 256 + 1),
    ],
)
def test_the_recipe_of_blocks_for_a_real_target(name: str, block_size: int, parameters_of_heads: int, tmp_path: Path) -> None:
    """fc 5H*H; a layer: q and o H*32*128 each, k and v H*8*128 each, feed-forward 3*H*12288, two norms of H and two of 128; two of H."""
    path = next(path for path in CONFIGS if path.stem == f"{name}-qwen3-8b")
    recipe = load_config(path, [f"model.target_path={tmp_path}"])
    next(family for family in FAMILIES if family.recipe == "eagle3-qwen3-8b").config.save_pretrained(tmp_path)
    target, options = TargetConfig.read(tmp_path), recipe.method.options
    table_VH = torch.empty(target.vocab_size, target.hidden_size, dtype=torch.bfloat16, device="meta")
    layers = captured_layers(recipe, target.num_hidden_layers)
    assert [layer - 1 for layer in layers] == [1, 9, 17, 25, 33]
    of_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
    parameters = 5 * 4096**2 + 5 * of_layer + 2 * 4096 + parameters_of_heads
    assert registered(name).load().count_parameters(options, TargetTables(table_VH, table_VH, target), layers) == parameters
    assert (options.block_size, options.mask_token_id, options.layers) == (block_size, 151669, 5)
    about = path.read_text()
    assert f"{round(parameters / 1e6):,} million" in about
    assert f"{6 * 4096 * 2 + 13:,} bytes a token" in about
    assert f"({', '.join(map(str, layers))}) of {target.num_hidden_layers}" in about


def test_the_recipe_of_peagle_for_a_real_target(tmp_path: Path) -> None:
    """As EAGLE-3's for it, with three more layers that see no embedding, and a feature of 3H for the mask."""
    family = next(family for family in FAMILIES if family.recipe == "eagle3-qwen3-8b")
    path = next(path for path in CONFIGS if path.stem == "peagle-qwen3-8b")
    recipe = load_config(path, [f"model.target_path={tmp_path}"])
    family.config.save_pretrained(tmp_path)
    target = TargetConfig.read(tmp_path)
    table_VH = torch.empty(target.vocab_size, target.hidden_size, dtype=torch.bfloat16, device="meta")
    layers = captured_layers(recipe, target.num_hidden_layers) or aux_layer_ids(target.num_hidden_layers)
    of_layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096
    parameters = family.parameters + 3 * of_layer + 3 * 4096
    tables = TargetTables(table_VH, table_VH, target)
    assert registered("peagle").load().count_parameters(recipe.method.options, tables, layers) == parameters
    about = path.read_text()
    assert f"{round(parameters / 1e6)} million" in about
    assert f"{family.bytes_per_token:,} bytes a token" in about
    assert f"({', '.join(map(str, layers))}) of {target.num_hidden_layers}" in about


@each_family
def test_a_recipe_on_the_target_it_is_named_after(family: Family, tmp_path: Path) -> None:
    """Everything that is read from the target's config.json, and the draft that follows from it, on the meta device."""
    family.config.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=list(family.eos_token_ids)).save_pretrained(tmp_path)
    recipe = load_config(family.path, [f"model.target_path={tmp_path}"])
    target = TargetConfig.read(tmp_path)
    assert target.eos_token_ids == family.eos_token_ids
    layers = aux_layer_ids(target.num_hidden_layers, recipe.model.aux_layer_ids)
    assert layers == family.aux_layer_ids

    table_VH = torch.empty(target.vocab_size, target.hidden_size, dtype=torch.bfloat16, device="meta")
    tables = TargetTables(table_VH, table_VH, target)
    options = recipe.method.options
    assert registered(recipe.method.name).load().count_parameters(options, tables, layers) == family.parameters
    with torch.device("meta"):
        vocabulary = DraftVocabulary(torch.arange(32000, device="cpu").numpy(), target.vocab_size)
        draft = Eagle3Draft(derive_config(options, tables, layers, 32000), vocabulary)
    method = Eagle3(options, draft, tables)
    assert method.draft_tokens == 7
    assert method.teacher_head_DH.shape == (32000, target.hidden_size)
    assert {parameter.device.type for parameter in method.parameters()} == {"meta"}
    assert draft.config.max_position_embeddings == family.config.max_position_embeddings

    meta = FeatureMeta(
        target_path="", target_fingerprint="", aux_layer_ids=layers, dtype=recipe.model.dtype,
        hidden_size=target.hidden_size, vocab_size=target.vocab_size,
    )  # fmt: skip
    assert meta.bytes_per_token == family.bytes_per_token
    about = family.path.read_text()
    assert f"{round(family.parameters / 1e6)} million" in about, "the recipe says how large the draft is"
    assert f"{family.bytes_per_token:,} bytes a token" in about
    assert f"({', '.join(map(str, layers))}) of {target.num_hidden_layers}" in about


@each_family
def test_the_draft_turns_positions_as_the_target_does(family: Family, tmp_path: Path) -> None:
    """Cosines and sines up to the end of the context, against the family's own rotary embedding, scaling included."""
    family.config.save_pretrained(tmp_path)
    target = TargetConfig.read(tmp_path)
    table_VH = torch.empty(target.vocab_size, target.hidden_size, device="meta")
    config = derive_config(load_config(family.path).method.options, TargetTables(table_VH, table_VH, target), family.aux_layer_ids, 8)
    with torch.device("meta"):
        draft = Eagle3Draft(config, DraftVocabulary(torch.arange(8, device="cpu").numpy(), target.vocab_size))
    rotary = type(draft.rotary)(config.head_dim, config.max_position_embeddings, config.rope_parameters)
    position_T = torch.tensor([0, 1, 127, 5000, target.max_position_embeddings - 1])
    mine_XC = rotary(target.max_position_embeddings)[position_T, 0]
    theirs = family.rotary(family.config)(torch.zeros(1), position_T[None])
    half = target.head_dim // 2
    for got_XC, expected in zip((mine_XC.real, mine_XC.imag), theirs, strict=True):
        torch.testing.assert_close(got_XC, expected[0, :, :half], rtol=0, atol=1e-6)
        torch.testing.assert_close(got_XC, expected[0, :, -half:], rtol=0, atol=1e-6)


def make_small(family: Family, folder: Path) -> PreTrainedModel:
    """A seven-layer model of the family with random weights, beside the tokenizer of the text target."""
    vocab_size = TargetConfig.read(make_text_target(folder)).vocab_size
    whole = {key: value for key, value in family.config.to_dict().items() if key != "layer_types"}
    shape = {**whole, **family.cut_down, "vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(family.config)(**shape))
    model.save_pretrained(folder)
    return model.eval()


@each_family
def test_capture_is_what_transformers_shows(family: Family, tmp_path: Path) -> None:
    """A padded batch of two, against `output_hidden_states` and logits of each text alone."""
    model = make_small(family, tmp_path)
    texts = [torch.arange(4, 34).numpy(), torch.arange(40, 51).numpy()]
    captured = Target.load(tmp_path, "float32").capture(texts, (2, 3, 4))
    for text, features in zip(texts, captured, strict=True):
        with torch.no_grad():
            shown = model(input_ids=torch.from_numpy(text)[None], output_hidden_states=True, use_cache=False)
        stream = torch.cat([shown.hidden_states[layer][0] for layer in (2, 3, 4)], -1)
        torch.testing.assert_close(features["aux"], stream, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features["logsumexp"], shown.logits[0].logsumexp(-1), rtol=1e-4, atol=1e-4)
        assert torch.equal(features["argmax"].long(), shown.logits[0].argmax(-1))


@each_family
def test_a_recipe_trains_a_small_target_of_its_family(family: Family, tmp_path: Path) -> None:
    make_small(family, tmp_path / "target")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    words = [
        f"model.target_path={tmp_path / 'target'}", f"data.train_path={rows}", f"data.eval_path={rows}", f"output_dir={tmp_path / 'run'}",
        "model.dtype=float32", "train.precision=float32", "data.max_length=64", "train.micro_batch_tokens=128", "train.batch_samples=4",
        "train.steps=2", "train.log_every=1", "train.learning_rate=1e-2", "train.warmup_steps=0", "eval.bootstrap=20",
        "method.options.draft_vocab_size=100", "method.options.intermediate_size=48",
    ]  # fmt: skip
    assert main(["train", str(family.path), *words]) == 0
    losses = [line["train/loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    draft = read_draft_config(resolve(tmp_path / "run" / "latest").path / "draft")
    assert tuple(draft["aux_layer_ids"]) == (2, 3, 4), "(2, 7//2, 7-3)"
    assert draft["head_dim"] == family.cut_down["head_dim"]
