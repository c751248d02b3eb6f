"""Shards of a store that go over to another one as they are: cut alike, and of the same types."""

from typing import Any

from saex_pipe.common.errors import SaexError
from saex_pipe.common.formats.activations import ActivationStore
from saex_pipe.common.formats.folder import Folder
from saex_pipe.common.formats.store_checks import check_object, fitting_entry
from saex_pipe.common.formats.store_info import StoreInfo


def copy_shard(source: ActivationStore, shard: int, folder: Folder, info: StoreInfo) -> dict[str, Any] | None:
    """Copy the objects of ``shard`` to the store in ``folder``, each checked on the way, and return its ledger entry.

    None where the two stores are not cut alike there, hold a tap in different types, or where the entry of the source
    is lost: the shard has to be put together anew.

    Raises:
        SaexError: an object is missing or is not what was written.
    """
    origin = Folder(source.uri)
    if not _alike(source.info, info, shard):
        return None
    entry = fitting_entry(source, shard, origin.read(f"ledger/{shard:06d}.json") or b"")
    if entry is None:
        return None
    for layout in info.layouts().values():
        name = layout.shard_object(shard)
        data = origin.read(name)
        troubles = check_object(data, source, layout, shard)
        if data is None or troubles:
            raise SaexError(
                f"{source.uri}/{layout.name} shard {shard}: {troubles[0].text}; "
                f"'saex-pipe store repair {source.uri}' makes it again"
            )
        folder.write(name, data)
    kept = {"checksums": info.layouts(), "statistics": info.taps, "added_error": info.channels}
    return entry | {name: {key: entry[name][key] for key in keys} for name, keys in kept.items()}


def _alike(source: StoreInfo, info: StoreInfo, shard: int) -> bool:
    shards, there = info.tiling.shards(info.windows), source.tiling.shards(source.windows)
    return (
        info.tiling == source.tiling
        and shards[shard] == there[shard]
        and all(info.dtypes[tap] == source.dtypes[tap] for tap in info.taps)
        and all(channels.to_json() == source.channels[tap].to_json() for tap, channels in info.channels.items())
    )
