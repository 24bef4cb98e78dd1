"""Clauses about the forward path: token ids become physical experts, and are counted."""

from __future__ import annotations

import torch

from eplb_platform.testing.checks import Site, check, require, require_equal

_NUM_PHYSICAL = 16


def _tables(site: Site, dtype: torch.dtype = torch.int32) -> tuple[torch.Tensor, torch.Tensor]:
    """Five experts with 1, 2, 3, 4 and 6 replicas on 16 physical experts, in no order."""
    counts = torch.tensor([1, 2, 3, 4, 6], dtype=dtype, device=site.device)
    physical = [[9], [4, 11], [0, 7, 15], [2, 3, 8, 12], [1, 5, 6, 10, 13, 14]]
    padded = [replicas + [-1] * (8 - len(replicas)) for replicas in physical]
    return torch.tensor(padded, dtype=dtype, device=site.device), counts


def _ids(site: Site, tokens: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand((tokens, 5), generator=generator)
    return scores.topk(3, dim=1).indices.to(dtype=dtype, device=site.device)


@check(connected=False)
def mapping_names_a_replica_of_each_expert(site: Site) -> None:
    """Each logical id becomes one of its expert's replicas, as int64; the arguments stay as they were."""
    for dtype in (torch.int32, torch.int64):
        table, counts = _tables(site, dtype)
        ids = _ids(site, 300, dtype)
        kept = ids.clone(), table.clone(), counts.clone()
        physical = site.backend.map_and_record(ids, table, counts, None)
        require(
            physical.dtype == torch.int64 and physical.shape == ids.shape,
            f"{physical.dtype}, {physical.shape}",
        )
        require(
            bool((table[ids.long()] == physical[..., None]).any(-1).all()),
            "an id is not a replica of its expert",
        )
        require(bool((physical >= 0).all()), "a token was sent to a padded entry")
        for argument, before in zip((ids, table, counts), kept, strict=True):
            require_equal(argument, before, "an argument")


@check(connected=False)
def mapping_counts_what_it_maps(site: Site) -> None:
    """`load` grows in place by the tokens of each physical expert."""
    table, counts = _tables(site)
    ids = _ids(site, 300)
    load = torch.full((_NUM_PHYSICAL,), 10**12, dtype=torch.int64, device=site.device)
    address = load.data_ptr()
    physical = site.backend.map_and_record(ids, table, counts, load)
    expected = 10**12 + torch.bincount(physical.flatten(), minlength=_NUM_PHYSICAL)
    require_equal(load, expected, "load")
    require(load.data_ptr() == address, "load was replaced, not counted into")


@check(connected=False)
def padding_stays_and_is_not_counted(site: Site) -> None:
    """An id of -1 stays -1 and is not counted, in whole rows and in single places."""
    table, counts = _tables(site)
    ids = _ids(site, 64)
    ids[10:] = -1
    ids[3, 1] = -1
    load = torch.zeros(_NUM_PHYSICAL, dtype=torch.int64, device=site.device)
    physical = site.backend.map_and_record(ids, table, counts, load)
    require_equal(physical == -1, ids == -1, "which ids are -1")
    require(int(load.sum()) == 29, f"{int(load.sum())} tokens were counted, expected 29")


@check(connected=False)
def mapping_is_repeatable(site: Site) -> None:
    """Equal arguments give equal results, with and without counting; no tokens give no ids."""
    table, counts = _tables(site)
    ids = _ids(site, 300)
    load = torch.zeros(_NUM_PHYSICAL, dtype=torch.int64, device=site.device)
    first = site.backend.map_and_record(ids, table, counts, load, offset=5)
    require_equal(site.backend.map_and_record(ids, table, counts, None, offset=5), first, "the second time")
    require(site.backend.map_and_record(ids[:0], table, counts, load).shape == (0, 3), "no tokens gave ids")


@check(connected=False)
def replicas_share_evenly(site: Site) -> None:
    """The replicas of an expert get equal shares, also when only every second or third ... row chooses it."""
    table, counts = _tables(site)
    for stride in (1, 2, 3, 4, 6, 8, 12, 16):
        for expert in range(5):
            ids = torch.full((4096 * stride, 1), -1, device=site.device)
            ids[::stride] = expert
            load = torch.zeros(_NUM_PHYSICAL, dtype=torch.int64, device=site.device)
            site.backend.map_and_record(ids, table, counts, load, offset=site.rank)
            shares = load[table[expert, : counts[expert]].long()]
            mean = 4096 / int(counts[expert])
            require(
                bool((shares - mean).abs().max() <= 0.1 * mean),
                f"every row of {stride} to expert {expert}: its replicas got {shares.tolist()} tokens",
            )


@check(connected=False)
def the_offset_moves_the_first_choice(site: Site) -> None:
    """One token at a time, over the offsets of many ranks: not all go to the same replica."""
    table, counts = _tables(site)
    for expert in range(1, 5):
        ids = torch.full((1, 1), expert, device=site.device)
        chosen = {
            int(site.backend.map_and_record(ids, table, counts, None, offset=rank)) for rank in range(64)
        }
        require(
            len(chosen) == int(counts[expert]), f"expert {expert}: 64 offsets reach only {sorted(chosen)}"
        )
