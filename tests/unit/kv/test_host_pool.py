"""Host blocks and the copies both ways: what comes back is what left, bit for bit, wherever it goes."""

from __future__ import annotations

import gc
import re

import pytest
import torch

from sglang_sparsespec.errors import PinError
from sglang_sparsespec.kv.offload import HostPool, Mover, block_keys, pinned_copy
from sglang_sparsespec.kv.queues import device_queues

NUM_SLOTS, BLOCK = 300, 16


def device_buffers(dtype: torch.dtype) -> list[torch.Tensor]:
    """K and V of two layers; the V heads are narrower, as in some models."""
    shapes = [(NUM_SLOTS, 2, 8), (NUM_SLOTS, 2, 8), (NUM_SLOTS, 2, 4), (NUM_SLOTS, 2, 4)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def mover_for(host: HostPool, buffers: list[torch.Tensor], *, is_staged: bool = False) -> Mover:
    return Mover(host, lambda: buffers, device_queues("cpu", None), is_staged=is_staged)


def pool_for(buffers: list[torch.Tensor], num_blocks: int) -> HostPool:
    widths = [buffer[0].numel() for buffer in buffers]
    num_bytes = num_blocks * BLOCK * sum(widths) * buffers[0].element_size()
    return HostPool(widths, buffers[0].dtype, num_bytes, block_tokens=BLOCK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "start"), [(1, 0), (15, 1), (16, 0), (17, 16), (17, 15), (100, 0), (100, 16), (100, 50), (100, 99)]
)
@pytest.mark.parametrize("is_staged", [False, True], ids=["direct", "staged"])
def test_kv_survives_the_way_out_and_back(dtype: torch.dtype, num_tokens: int, start: int, is_staged: bool) -> None:
    """A token in another's place, a layer in another's, K for V, or a seam between blocks that is off by one."""
    buffers = device_buffers(dtype)
    host = pool_for(buffers, num_blocks=10)
    mover = mover_for(host, buffers, is_staged=is_staged)
    # blocks out of order, as after a while
    blocks = [7, 2, 3, 0, 4, 1, 9][: host.blocks_for(num_tokens)]
    slots = torch.randperm(NUM_SLOTS)[:num_tokens]
    expected = [buffer[slots].clone() for buffer in buffers]
    out = mover.copy_out(slots, blocks)
    assert out.is_done()
    for buffer in buffers:
        buffer.fill_(float("nan"))
    target = torch.randperm(NUM_SLOTS)[: num_tokens - start]
    back = mover.copy_in(target, blocks, start=start)
    for buffer, kv in zip(buffers, expected, strict=True):
        assert torch.equal(buffer[target], kv[start:])
        untouched = torch.ones(NUM_SLOTS, dtype=torch.bool)
        untouched[target] = False
        assert buffer[untouched].isnan().all()
    assert out.num_bytes == num_tokens * 48 * dtype.itemsize
    assert back.num_bytes == (num_tokens - start) * 48 * dtype.itemsize
    assert out.seconds() > 0
    out.wait()


def test_requests_do_not_share_blocks() -> None:
    """KV of one request read back for another is the one error that no parity test forgives."""
    buffers = device_buffers(torch.float32)
    host = pool_for(buffers, num_blocks=6)
    mover = mover_for(host, buffers)
    slots = torch.randperm(NUM_SLOTS)
    parts = {name: slots[i * 40 : i * 40 + 20 + i] for i, name in enumerate("abc")}
    expected = {name: buffers[0][part].clone() for name, part in parts.items()}
    blocks = {}
    for name, part in parts.items():
        blocks[name] = host.alloc(len(part))
        mover.copy_out(part, blocks[name])
    assert host.alloc(1) is None, "six blocks are taken"
    for name, part in parts.items():
        mover.copy_in(part, blocks[name])
        assert torch.equal(buffers[0][part], expected[name])
        host.free(blocks[name])
    assert sorted(host.free_blocks) == list(range(6))


def test_blocks_of_a_prefix_are_free_when_the_last_holder_is_gone() -> None:
    """A block that is handed out under its second holder, or never again."""
    host = pool_for(device_buffers(torch.float32), num_blocks=6)
    tokens = list(range(2 * BLOCK + 5))
    keys = block_keys(tokens, None, BLOCK)
    assert len(keys) == 2
    assert host.share(keys) == []
    first = host.alloc(len(tokens))
    assert first == [0, 1, 2]
    host.publish(keys, first[:2])
    shared = host.share(keys)
    assert shared == [0, 1]
    assert [host.num_holders(block) for block in range(4)] == [2, 2, 1, 0]
    assert host.used_bytes == host.num_bytes // 2, "each counts once"
    # the one that brought them goes first
    host.free(first)
    assert host.free_blocks == [2, 3, 4, 5]
    assert host.share(keys[:1]) == [0]
    host.free([0])
    host.free(shared)
    assert host.free_blocks == [0, 1, 2, 3, 4, 5]
    assert host.share(keys) == [], "what is in them is no longer what the key says"
    # the same prefix again, and one that came to the host twice: the first stays known
    again, twice = host.alloc(BLOCK), host.alloc(BLOCK)
    host.publish(keys[:1], again or [])
    host.publish(keys[:1], twice or [])
    host.free(twice or [])
    assert host.share(keys) == again


def test_keys_tell_prefixes_apart() -> None:
    """KV of another prefix, adapter or salt under the same tokens."""
    tokens = list(range(3 * BLOCK))
    keys = block_keys(tokens, None, BLOCK)
    assert len(keys) == len(set(keys)) == 3
    assert block_keys(tokens[: 3 * BLOCK - 1], None, BLOCK) == keys[:2]
    assert block_keys(tokens[: BLOCK - 1], None, BLOCK) == block_keys([], None, BLOCK) == []
    assert not set(keys) & set(block_keys(tokens, "adapter", BLOCK))
    changed = block_keys([7, *tokens[1:]], None, BLOCK)
    assert not set(keys) & set(changed), "a later block depends on all before it"
    assert len({*block_keys([1] * 2 * BLOCK, None, BLOCK)}) == 2


def test_a_copy_out_may_begin_behind_what_is_there() -> None:
    """The prefix of another request overwritten, or the rest in its place."""
    buffers = device_buffers(torch.float32)
    host = pool_for(buffers, num_blocks=4)
    mover = mover_for(host, buffers, is_staged=True)
    slots = torch.randperm(NUM_SLOTS)[: 2 * BLOCK + 3]
    blocks = [3, 0, 2]
    mover.copy_out(slots[:BLOCK], blocks[:1])
    rest = mover.copy_out(slots[BLOCK:], blocks, start=BLOCK)
    assert rest.num_bytes == (BLOCK + 3) * host.bytes_per_token
    expected = [buffer[slots].clone() for buffer in buffers]
    target = torch.randperm(NUM_SLOTS)[: len(slots)]
    mover.copy_in(target, blocks)
    assert all(torch.equal(buffer[target], kv) for buffer, kv in zip(buffers, expected, strict=True))
    assert mover.copy_out(slots[:0], blocks[:1], start=BLOCK).is_done(), "nothing is left to copy"


def test_buffers_are_asked_for_at_every_copy() -> None:
    """SGLang may replace its buffers after it has captured its graphs."""
    buffers = device_buffers(torch.float32)
    host = pool_for(buffers, num_blocks=1)
    mover = mover_for(host, buffers)
    buffers[:] = device_buffers(torch.float32)
    blocks, slots = host.alloc(3), torch.tensor([5, 1, 7])
    assert blocks is not None
    mover.copy_out(slots, blocks)
    ((first, rows),) = host.chunks(blocks, 0, 3)
    assert first == 0
    assert torch.equal(rows[:, :16], buffers[0][slots].flatten(1))


def test_neighbours_cross_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy for every block costs a small model more in launches than its bytes take to cross."""
    host = pool_for(device_buffers(torch.float32), num_blocks=8)
    blocks = host.alloc(3 * BLOCK - 5)
    assert blocks == [0, 1, 2]
    assert [(first, len(rows)) for first, rows in host.chunks(blocks, 0, 3 * BLOCK - 5)] == [(0, 3 * BLOCK - 5)]
    assert [(first, len(rows)) for first, rows in host.chunks(blocks, 20, 40)] == [(20, 20)]
    assert list(host.chunks(blocks, 7, 7)) == []
    # a gap of two, too small for three: they come from behind it, then from wherever there is room
    host.free([0, 2])
    assert host.free_blocks == [0, 2, 3, 4, 5, 6, 7]
    assert host.alloc(3 * BLOCK) == [2, 3, 4]
    host.free([3])
    scattered = host.alloc(4 * BLOCK)
    assert scattered == [0, 3, 5, 6]
    assert [first for first, _ in host.chunks(scattered, 0, 4 * BLOCK)] == [0, BLOCK, 2 * BLOCK]
    assert host.alloc(0) == []
    monkeypatch.setattr("sglang_sparsespec.kv.offload.CHUNK_BYTES", 20 * host.bytes_per_token)
    assert [(f, len(rows)) for f, rows in host.chunks([5, 6], 3, 30)] == [(3, 20), (23, 7)]
    monkeypatch.setattr("sglang_sparsespec.kv.offload.CHUNK_BYTES", 1)
    assert [(f, len(rows)) for f, rows in host.chunks([5, 6], 15, 17)] == [(15, 1), (16, 1)]


@pytest.mark.parametrize("num_bytes", [0, 48 * 4 * BLOCK - 1])
def test_memory_below_one_block_holds_nothing(num_bytes: int) -> None:
    """Rounding up would take more memory than the user gave."""
    host = HostPool([16, 16, 8, 8], torch.float32, num_bytes, block_tokens=BLOCK)
    assert host.num_blocks == host.num_bytes == 0
    assert host.alloc(1) is None


class FakeCudart:
    """Registers memory as CUDA does: no address twice; error codes are enums that do not print their number."""

    class Error:
        def __init__(self, code: int) -> None:
            self._code = code

        def __int__(self) -> int:
            return self._code

        def __str__(self) -> str:
            return "cudaError.???"

    def __init__(self, limit: int = 1 << 40) -> None:
        self.registered: dict[int, int] = {}
        self._limit = limit

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> FakeCudart.Error:
        if any(a < address + num_bytes and address < a + size for a, size in self.registered.items()):
            return self.Error(712)
        if num_bytes > self._limit:
            return self.Error(2)
        self.registered[address] = num_bytes
        return self.Error(0)

    def cudaHostUnregister(self, address: int) -> FakeCudart.Error:
        return self.Error(0 if self.registered.pop(address, None) else 713)


@pytest.mark.parametrize("is_in_cycle", [False, True], ids=["counted", "cycle"])
def test_memory_is_pinned_as_long_as_its_pool_lives(monkeypatch: pytest.MonkeyPatch, is_in_cycle: bool) -> None:
    """Memory freed while registered: the next pool at the address is refused, or another user's copies are."""
    cudart = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    for _ in range(3):
        host = HostPool([2, 2], torch.float32, 1 << 16, block_tokens=4, is_pinned=True)
        address = host._memory.data_ptr()
        assert cudart.registered == {address: host.num_bytes}
        if is_in_cycle:
            host.itself = host  # type: ignore[attr-defined]
        del host
        gc.collect()
        assert cudart.registered == {}


def test_memory_that_cannot_be_pinned_names_size_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudaError.???` helps nobody; and a refused pool must not unregister what it never registered."""
    cudart = FakeCudart(limit=1000)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(PinError, match=re.escape("does not pin 2e-06 GB of host memory (cudaError 2)")):
        HostPool([2, 3], torch.float32, 2000, block_tokens=4, is_pinned=True)
    HostPool([2, 2], torch.float32, 0, block_tokens=4, is_pinned=True)
    assert cudart.registered == {}


def test_pinned_copy_is_a_copy() -> None:
    """A view would change with the row that it was taken from."""
    row = torch.arange(4)
    copy = pinned_copy(row)
    row.zero_()
    assert copy.tolist() == [0, 1, 2, 3]


def test_warm_up_changes_nothing() -> None:
    """It runs on the pool that will serve, whatever is in slot 0."""
    buffers = device_buffers(torch.float32)
    before = [buffer.clone() for buffer in buffers]
    host = pool_for(buffers, num_blocks=2)
    mover_for(host, buffers, is_staged=True).warm_up()
    assert all(torch.equal(a, b) for a, b in zip(buffers, before, strict=True))
    assert host.used_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kv_survives_beside_rounds_on_a_gpu(dtype: torch.dtype) -> None:
    """The kernel, the staging block, pinned memory and the order of streams, as a server uses them.

    The round in flight before the way back is slow, and writes into the slots that are restored to.
    """
    rounds = torch.cuda.Stream()
    buffers = [buffer.cuda() for buffer in device_buffers(dtype)]
    widths = [buffer[0].numel() for buffer in buffers]
    num_bytes = 40 * BLOCK * sum(widths) * buffers[0].element_size()
    host = HostPool(widths, dtype, num_bytes, block_tokens=BLOCK, is_pinned=True)
    mover = Mover(host, lambda: buffers, device_queues("cuda", rounds), is_staged=True)
    mover.warm_up()
    slots = torch.randperm(NUM_SLOTS, device="cuda")[:250]
    expected = [buffer[slots].clone() for buffer in buffers]
    for start in (0, 37, 240):
        blocks = host.alloc(len(slots))
        assert blocks is not None
        out = mover.copy_out(slots, blocks)
        out.wait()
        target = torch.randperm(NUM_SLOTS, device="cuda")[: len(slots) - start]
        with torch.cuda.stream(rounds):
            rounds.wait_stream(torch.cuda.current_stream())
            torch.cuda._sleep(10**8)
            for buffer in buffers:
                buffer.fill_(float("nan"))
        back = mover.copy_in(target, blocks, start=start)
        assert not back.is_done(), "the round in flight comes first"
        back.wait()
        assert back.seconds() > 0
        for buffer, kv in zip(buffers, expected, strict=True):
            assert torch.equal(buffer[target], kv[start:])
            buffer[slots] = kv
        host.free(blocks)
        torch.cuda.synchronize()
