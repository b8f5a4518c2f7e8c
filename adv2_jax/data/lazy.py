"""Images that are decoded when they are asked for; work that is done beside that on the device."""

import contextlib
import copy
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adv2_jax.identity import hash_of

T = TypeVar("T")
BLOCK = 64  # images that are decoded at a time where only their digests are wanted


class LazyImages:
    """A read-only array uint8 [N, H, W, 3] whose images are decoded whenever they are asked for.

    It is indexed along its first axis only, and gives arrays of NumPy: `images[3]`, `images[2:9]`,
    `images[indices]`. Nothing that was decoded is kept but a digest of each image.

    The fingerprint of the set (`identity.tree_fingerprint`) is made of the digests. It costs no
    second reading, since a run decodes every image when it selects those that the network gets
    right. It is of pixels, not of names, sizes and times of files: an edited file changes it, and a
    copy of the files elsewhere does not.

    Args:
        names: of the N images, for messages.
        decode: index -> uint8 [H, W, 3]; called from several threads.

    Raises:
        ValueError: here and whenever images are decoded: as `decode`; an image has another size
            than the first, or is not what it was when it was decoded before (says which).
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, names: Sequence[str], decode: Callable[[int], NDArray[np.uint8]]):
        self._names, self._decode = names, decode
        # shared by all views; 0: not known yet
        self._digests = np.zeros(len(names), np.uint64)
        self._indices = np.arange(len(names))
        # the first image alone tells the size, and whether anything can be read at all
        self._size = decode(0).shape

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, 3]."""
        return (len(self), *self._size)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        chosen = self._indices[key]
        images = np.empty((chosen.size, *self._size), np.uint8)

        def fill(k: int) -> None:
            images[k] = self._decoded(int(chosen.flat[k]))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # an error or Ctrl-C cancels what has not begun
            list(pool.map(fill, range(chosen.size)))
        return images.reshape(*chosen.shape, *self._size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def take(self, indices: Any) -> "LazyImages":
        """Return the images at `indices` (integers, booleans [N] or a slice); decode nothing."""
        view = copy.copy(self)
        view._indices = self._indices[indices]
        return view

    @property
    def digests(self) -> NDArray[np.uint64]:
        """[N] 64 bits of each image, by which it is known; those not yet decoded are read."""
        unknown = np.flatnonzero(self._digests[self._indices] == 0)
        for start in range(0, len(unknown), BLOCK):
            self[unknown[start : start + BLOCK]]  # decoding writes the digest down
        return self._digests[self._indices]

    def _decoded(self, i: int) -> NDArray[np.uint8]:
        """Return an image of the source; refuse one that does not suit what was decoded before."""
        image = self._decode(i)
        if image.shape != self._size:
            (height, width), (h, w) = self._size[:2], image.shape[:2]
            raise ValueError(
                f"{self._names[0]} is {width} x {height} pixels, {self._names[i]} {w} x {h}: "
                "--size N brings images to one size"
            )
        (digest,) = np.frombuffer(hash_of([np.ascontiguousarray(image)]), np.uint64)
        # between the choice of images and the attack on them lie hours
        if self._digests[i] not in (0, digest):
            raise ValueError(f"{self._names[i]} has changed since it was first read")
        self._digests[i] = digest
        return image


Images = NDArray[np.uint8] | LazyImages


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield items, each of them made in a thread while the consumer works on the one before.

    One item at most waits for its consumer. What is raised when an item is made is raised here in
    its place. A consumer that stops early waits for the item under way, and leaves no thread.
    """
    end: Any = object()
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, iterator, end)
            yield item


@contextlib.contextmanager
def behind(work: Callable[..., object], waiting: int) -> Iterator[Callable[..., None]]:
    """Yield a function that has `work` done in a thread, in order, while its caller goes on.

    So many calls at most wait for the thread; the next one waits for the oldest of them. After an
    error nothing more is done; it is raised at the next call that knows of it, at the latest at the
    end of the block. A block that ends early waits for the calls that it has made.
    """

    def after(previous: Future[None], *arguments: Any) -> None:
        previous.result()  # raises its error: so does all that follows
        work(*arguments)

    def call(*arguments: Any) -> None:
        if len(calls) == waiting:
            calls[0].result()
        if calls[-1].done():  # not waited for, but its error is known
            calls[-1].result()
        calls.append(pool.submit(after, calls[-1], *arguments))

    with ThreadPoolExecutor(1) as pool:
        calls = deque([pool.submit(lambda: None)], maxlen=waiting)
        yield call
        calls[-1].result()
