"""Memory that this process fills and another one reads: where the state of a run is while it is written to disk.

Owns: `Arena`, blocks of shared memory handed out from front to back, kept from one save to the next. Leaves to others:
what is put there (snapshot.py), the process that reads it (writer.py).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from trainwright.forks import hold_alone

Buffer = bytes | bytearray | memoryview

ALIGNMENT = 64  # bytes; what torch's own allocator and files use
ROOM_FOR_SMALL_FILES = 1 << 20  # bytes, besides the tensors that were predicted


class Place(NamedTuple):
    """Where bytes lie: number of the block, first byte in it, how many."""

    block: int
    offset: int
    num_bytes: int


class Block:
    """One piece of shared memory, named by a file descriptor that can be sent to another process."""

    def __init__(self, descriptor: int, num_bytes: int, *, fill: bool = False) -> None:
        self.descriptor, self.num_bytes = descriptor, num_bytes
        # Pages that are there already are what makes the first save as quick as the others.
        populate = getattr(mmap, "MAP_POPULATE", 0) if fill else 0
        self.memory = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | populate)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self._is_pinned = False

    @classmethod
    def new(cls, num_bytes: int) -> Block:
        """A fresh block. Raises OSError where the system has no room for it."""
        try:
            descriptor = os.memfd_create("trainwright-checkpoint")
        except (AttributeError, OSError):  # other Unix systems, and sandboxes that forbid it
            # A file without a name does the same, with some writing to the disk.
            descriptor, path = tempfile.mkstemp(prefix="trainwright-checkpoint-")
            os.unlink(path)
        try:
            os.ftruncate(descriptor, num_bytes)
            return cls(descriptor, num_bytes, fill=True)
        except BaseException:
            os.close(descriptor)
            raise

    def storage(self, place: Place) -> Any:
        """The bytes at `place` as a torch storage of exactly that size, sharing the memory."""
        if place.num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8).untyped_storage()
        one = torch.frombuffer(self.memory, dtype=torch.uint8, count=place.num_bytes, offset=place.offset)
        return one.untyped_storage()

    def pin(self) -> None:
        """Have CUDA copy into this block directly, which is what lets a copy overlap with the step."""
        if not self._is_pinned:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostRegister(self.bytes.data_ptr(), self.num_bytes, 0))
            self._is_pinned = True

    def close(self, *, is_over: bool = False) -> None:
        """Let go of the memory. Tensors that still share it keep it, unless it `is_over`: then the system has it back,
        although a fork of this process may still map it, and finds zeros there.
        """
        if self._is_pinned:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostUnregister(self.bytes.data_ptr()))
            self._is_pinned = False
        if is_over and hasattr(mmap, "MADV_REMOVE"):  # Linux
            with suppress(OSError):
                self.memory.madvise(mmap.MADV_REMOVE)
        os.close(self.descriptor)


class Arena:
    """Shared memory from which places are handed out until `clear`; grows by a block when it is full."""

    def __init__(self, num_bytes: int = 0) -> None:
        self.blocks: list[Block] = []
        self.num_made = 0  # blocks since the beginning
        self.num_text_bytes_copied = 0  # bytes that `put_text` copied, since the beginning
        self._current = self._used = 0  # block that is being handed out, and bytes of it
        # The block of a text that stays from save to save, how much of it is there, and its version.
        self._text_block: int | None = None
        self._text_bytes, self._text_version = 0, None
        hold_alone(self)
        if num_bytes:
            self._add(num_bytes + ROOM_FOR_SMALL_FILES)

    def clear(self) -> None:
        """Hand out everything anew. What a save needed is kept for the next, which needs the same."""
        self._current = self._used = 0

    def reserve(self, num_bytes: int) -> Place:
        """Room for `num_bytes` in one piece, at a multiple of ALIGNMENT."""
        while self._current < len(self.blocks):
            if self._current != self._text_block and self._used + num_bytes <= self.blocks[self._current].num_bytes:
                break
            self._current, self._used = self._current + 1, 0
        else:
            # A share of what is there, so that a log that grows does not add a block at each save.
            self._add(max(num_bytes, ROOM_FOR_SMALL_FILES, sum(block.num_bytes for block in self.blocks) // 8))
        place = Place(self._current, self._used, num_bytes)
        self._used += aligned(num_bytes)
        return place

    def adopt(self, descriptor: int, num_bytes: int) -> None:
        """Map a block that another process made."""
        self.blocks.append(Block(descriptor, num_bytes))

    def close(self, *, is_over: bool = False) -> None:
        """Let go of all blocks, each as `Block.close`."""
        for block in self.blocks:
            block.close(is_over=is_over)
        self.blocks = []

    def let_go(self) -> None:
        """In a fork: the memory is that of the process that made it."""
        for block in self.blocks:
            os.close(block.descriptor)
        self.blocks = []

    def view(self, place: Place) -> torch.Tensor:
        """The bytes at `place`, as a tensor that shares them."""
        return self.blocks[place.block].bytes[place.offset : place.offset + place.num_bytes]

    def memory(self, place: Place) -> memoryview:
        """The bytes at `place`, not copied."""
        return memoryview(self.blocks[place.block].memory)[place.offset : place.offset + place.num_bytes]

    def read(self, place: Place) -> bytes:
        """A copy of the bytes at `place`."""
        return bytes(self.memory(place))

    def put(self, content: bytes) -> Place:
        """Copy `content` into the arena."""
        place = self.reserve(len(content))
        self.blocks[place.block].memory[place.offset : place.offset + len(content)] = content
        return place

    def put_text(self, text: Buffer, version: Any) -> Place:
        """Have `text` in the arena, at a place that `clear` does not touch. Of a text of the same `version` as that of
        the call before, only what it is longer by is copied.
        """
        num_bytes = len(text)
        if self._text_block is None or self.blocks[self._text_block].num_bytes < num_bytes:
            self._add(num_bytes + num_bytes // 4)
            if self._text_block is None:
                self._text_block = len(self.blocks) - 1
            else:
                outgrown, self.blocks[self._text_block] = self.blocks[self._text_block], self.blocks.pop()
                outgrown.close()
            self._text_version = None
        begin = self._text_bytes if version == self._text_version and self._text_bytes <= num_bytes else 0
        with memoryview(text) as all_of_it, all_of_it[begin:] as new:
            self.blocks[self._text_block].memory[begin:num_bytes] = new
        self._text_bytes, self._text_version = num_bytes, version
        self.num_text_bytes_copied += num_bytes - begin
        return Place(self._text_block, 0, num_bytes)

    def _add(self, num_bytes: int) -> None:
        self.blocks.append(Block.new(-(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE))
        self.num_made += 1


def check_room(num_bytes: int) -> None:
    """Raise MemoryError where a copy of a state of `num_bytes` will not fit, before the system kills for want of it."""
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise MemoryError(
            f"async_save=True keeps a copy of the state in host memory, about {num_bytes / 2**30:.1f} GiB, but only "
            f"{available / 2**30:.1f} GiB are available: leave it out, or set save_only_model=True."
        )


def available_bytes() -> int | None:
    """Host memory that can still be used, under the limit of the container; None where the system does not say."""
    found = []
    try:
        found.append(1024 * _entries("/proc/meminfo")["MemAvailable:"])
        group, used = "/sys/fs/cgroup/", _entries("/sys/fs/cgroup/memory.stat")
        with open(group + "memory.max") as most, open(group + "memory.current") as current:
            files = used["active_file"] + used["inactive_file"]  # given back when memory is short
            found.append(int(most.read()) - int(current.read()) + files)
    except (OSError, ValueError, KeyError):  # another system, no limit ("max"), or an older kind of group
        pass
    return min(found, default=None)


def _entries(path: str) -> dict[str, int]:
    with open(path, encoding="ascii") as file:
        return {words[0]: int(words[1]) for words in map(str.split, file) if len(words) > 1}


def aligned(num_bytes: int) -> int:
    """`num_bytes`, rounded up to a multiple of ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
