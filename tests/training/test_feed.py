"""A batch on its way to a GPU."""

from contextlib import nullcontext

import torch

from xlc_ray.activations.packed import Unpacker
from xlc_ray.dictionary import Shards
from xlc_ray.training import feed

CPU = torch.device("cpu")


def test_a_batch_is_gathered_where_the_copy_to_the_device_begins(monkeypatch):
    """Without a GPU: in the memory that is asked for as pinned, and in no other."""
    pinned, empty = [], torch.empty

    def with_a_note(*size, pin_memory, **options):
        pinned.append((empty(*size, **options), pin_memory))
        return pinned[-1][0]

    monkeypatch.setattr(torch, "empty", with_a_note)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    shape = feed.Shape({"a": 3, "b": 2}, 4, torch.float32, 8)
    for side in (None, object()):
        batch = {"b": torch.randn(4, 2), "a": torch.randn(4, 3)}
        sent = feed._next(iter([batch]), Unpacker(CPU), shape, Shards(), CPU, side)
        ((buffer, pin),) = pinned
        assert sent.data_ptr() == buffer.data_ptr()
        assert pin == (side is not None)
        assert all(torch.equal(value, batch[site]) for site, value in shape.by_site(sent).items())
        pinned.clear()
