"""Offline capture: the target's features of many samples, by all ranks, into one store.

The plan follows from the samples alone: consecutive samples make a shard, and within a shard samples of like length make a
forward. Ranks only share the shards out, so features are the same numbers at any world size, and a restart, at any world
size, goes on with the shards that are not finished yet.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features.rendezvous import Rendezvous
from specforge.features.store import (
    FeatureMeta,
    LocalFeatureStore,
    Sample,
    SampleFeatures,
    ShardRecord,
    check_finite,
    require_unique,
    shard_name,
    write_index,
    write_shard,
)
from specforge.features.target import Target
from specforge.features.teacher import likeliest

_SHARDS_WANTED = 64
_FORWARDS_PER_SHARD = 4
_PLAN = "plan.json"


def capture_features(
    samples: Sequence[Sample],
    load_target: Callable[[], Target],
    folder: Path,
    meta: FeatureMeta,
    world: World,
    *,
    capture_tokens: int,
    shard_bytes: int,
) -> LocalFeatureStore:
    """Capture `samples` into the store `folder`, in their order. All ranks call it together and see the same disk.

    A forward holds at most `capture_tokens` tokens, padding included (a longer sample is alone in its own), and a shard
    at most `shard_bytes`. Finished shards wait in the hidden folder `.NAME.capture` beside `folder` until all are there.

    Raises:
        FeatureError: a feature is not finite, the disk is too small, `folder` exists, another job captures into it, or
            what an earlier, interrupted capture left behind has another plan. Nothing is published then.
    """
    shards = plan_shards([len(sample.input_ids) for sample in samples], meta.bytes_per_token, capture_tokens, shard_bytes)
    work = folder.with_name(f".{folder.name}.capture")
    with files.writable(folder.parent, FeatureError), Rendezvous(folder.parent, world) as meeting, contextlib.ExitStack() as held:
        if world.is_main:
            lock = files.Lock(work.with_name(f"{work.name}.lock"))
            if not lock.try_acquire():
                raise FeatureError(f"{folder}: another job captures into it now; wait for it or choose another features.path.")
            held.callback(lock.release)
            _begin(folder, work, _plan_of(samples, meta, capture_tokens, shard_bytes))
        meeting.meet("begun")
        mine = range(world.rank, len(shards), world.size)
        damaged = meeting.meet("checked", [number for number in mine if _finished(work, number) is None])
        pending = sorted(number for numbers in damaged for number in numbers)
        if world.is_main:
            tokens = sum(len(samples[i].input_ids) for number in pending for i in shards[number])
            files.require_free(work, tokens * meta.bytes_per_token, f"capture of {tokens} tokens", FeatureError)
        meeting.meet("enough room")
        _capture_shards(samples, shards, pending[world.rank :: world.size], load_target, work, meta, world, capture_tokens)
        meeting.meet("captured")
        if world.is_main:
            _publish(work, folder, meta, samples, shards)
        meeting.meet("published")
    return LocalFeatureStore(folder)


def plan_shards(lengths: Sequence[int], bytes_per_token: int, capture_tokens: int, shard_bytes: int) -> list[range]:
    """Sample numbers of each shard: as many shards as keep many ranks busy, none above `shard_bytes` (one sample at least)."""
    share = max(sum(lengths) // _SHARDS_WANTED, _FORWARDS_PER_SHARD * capture_tokens)
    limit_tokens = min(share, shard_bytes // bytes_per_token)
    shards, first, tokens = [], 0, 0
    for number, length in enumerate(lengths):
        if number > first and tokens + length > limit_tokens:
            shards.append(range(first, number))
            first, tokens = number, 0
        tokens += length
    return [*shards, range(first, len(lengths))] if lengths else []


def forwards(numbers: Iterable[int], lengths: Sequence[int] | Mapping[int, int], capture_tokens: int) -> Iterator[list[int]]:
    """The samples in groups of like length, each at most `capture_tokens` when padded to its longest; each sample once."""
    group: list[int] = []
    for number in sorted(set(numbers), key=lambda number: (-lengths[number], number)):
        if group and lengths[group[0]] * (len(group) + 1) > capture_tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _plan_of(samples: Sequence[Sample], meta: FeatureMeta, capture_tokens: int, shard_bytes: int) -> dict[str, object]:
    require_unique([sample.id for sample in samples])
    return {
        "meta": dataclasses.asdict(meta),
        "samples": samples_sha256(samples),
        "capture_tokens": capture_tokens,
        "shard_bytes": shard_bytes,
    }


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Hash of the samples in their order: ids, domains, tokens and masks."""
    content = hashlib.sha256()
    for sample in samples:
        content.update(json.dumps([sample.id, sample.domain, len(sample.input_ids)]).encode())
        content.update(sample.input_ids.tobytes() + sample.loss_mask.tobytes())
    return content.hexdigest()


def _begin(folder: Path, work: Path, plan: dict[str, object]) -> None:
    if folder.exists():
        raise FeatureError(f"{folder}: exists already; use it, remove it, or choose another features.path.")
    work.mkdir(parents=True, exist_ok=True)
    plan = json.loads(json.dumps(plan))
    if not (work / _PLAN).exists():
        files.write_json(work / _PLAN, plan)
    earlier = files.read_json(work / _PLAN, FeatureError)
    if earlier != plan:
        differing = ", ".join(sorted(key for key in plan if earlier.get(key) != plan[key]))
        raise FeatureError(
            f"{work}: an interrupted capture with other settings ({differing}) left its shards there; "
            f"restore the settings to go on with it, or remove that folder to begin anew."
        )


def _record_path(work: Path, number: int) -> Path:
    return work / f"{shard_name(number)}.json"


def _finished(work: Path, number: int) -> ShardRecord | None:
    """The record of a shard that is complete and as it was written."""
    if not _record_path(work, number).exists():
        return None
    record = ShardRecord(**files.read_json(_record_path(work, number), FeatureError))
    path = work / shard_name(number)
    return record if path.is_file() and files.sha256_file(path) == record.sha256 else None


def _capture_shards(
    samples: Sequence[Sample],
    shards: Sequence[range],
    mine: Sequence[int],
    load_target: Callable[[], Target],
    work: Path,
    meta: FeatureMeta,
    world: World,
    capture_tokens: int,
) -> None:
    """Capture the shards `mine`; while one is being written, the next is computed."""
    if not mine:
        return
    lengths = [len(sample.input_ids) for sample in samples]
    target = load_target()
    check_kind(target, meta)
    total = sum(lengths[i] for number in mine for i in shards[number])
    with ThreadPoolExecutor(1) as writer, tqdm(total=total, unit="tok", desc="capture", disable=None if world.is_main else True) as bar:
        writing: Future[None] = writer.submit(lambda: None)
        for number in mine:
            captured = capture_samples(target, samples, shards[number], capture_tokens, meta, bar.update)
            writing.result()
            writing = writer.submit(_write, work, number, [captured[i] for i in shards[number]])
        writing.result()


def check_kind(target: Target, meta: FeatureMeta) -> None:
    """Raises FeatureError unless `target` gives features of dtype, width and vocabulary `meta`."""
    given = (str(target.dtype).removeprefix("torch."), target.hidden_size, target.vocab_size)
    wanted = (meta.dtype, meta.hidden_size, meta.vocab_size)
    if given != wanted:
        raise FeatureError(
            f"target {target.path!r}: dtype, hidden size and vocabulary are {given}, "
            f"the features are declared as {wanted}; declare what it has."
        )


def capture_samples(
    target: Target,
    samples: Sequence[Sample],
    numbers: Sequence[int],
    capture_tokens: int,
    meta: FeatureMeta,
    tell_tokens: Callable[[int], object] = lambda tokens: None,
) -> dict[int, SampleFeatures]:
    """Features by sample number. They depend on nothing but the target and which samples share a forward."""
    lengths = {number: len(samples[number].input_ids) for number in numbers}
    captured: dict[int, SampleFeatures] = {}
    for group in forwards(numbers, lengths, capture_tokens):
        captured.update(zip(group, capture_group(target, [samples[number] for number in group], meta), strict=True))
        tell_tokens(sum(lengths[number] for number in group))
    return captured


def capture_group(target: Target, samples: Sequence[Sample], meta: FeatureMeta) -> list[SampleFeatures]:
    """The features of `samples` by one forward, in main memory.

    Raises:
        FeatureError: naming the sample whose features are not finite.
    """
    captured = []
    for sample, tensors in zip(samples, target.capture([sample.input_ids for sample in samples], meta.aux_layer_ids), strict=True):
        if meta.teacher_top_k:
            tensors["top_ids"], tensors["top_log_probs"] = likeliest(target, tensors["last"], tensors["logsumexp"], meta.teacher_top_k)
            tensors["last"] = torch.empty(0)
        features = SampleFeatures(
            torch.tensor(sample.input_ids, dtype=torch.int32),
            torch.tensor(sample.loss_mask, dtype=torch.bool),
            **{name: tensor.cpu() for name, tensor in tensors.items()},
        )
        check_finite(sample.id, features)
        captured.append(features)
    return captured


def _write(work: Path, number: int, features: Sequence[SampleFeatures]) -> None:
    record = write_shard(work / shard_name(number), features)
    files.write_json(_record_path(work, number), dataclasses.asdict(record))


def _publish(work: Path, folder: Path, meta: FeatureMeta, samples: Sequence[Sample], shards: Sequence[range]) -> None:
    write_index(work, meta, samples, [len(numbers) for numbers in shards])
    records = [ShardRecord(**files.read_json(_record_path(work, number), FeatureError)) for number in range(len(shards))]
    progress = [_PLAN, *(_record_path(work, number).name for number in range(len(shards)))]
    files.publish(work, folder, known_sha256={record.name: record.sha256 for record in records}, leave_out=progress)
    for name in progress:
        (folder / name).unlink()
