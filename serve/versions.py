"""Which release is being served: kept versions in each replica, and one choice shared by all of them."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

from ray.experimental import internal_kv

from audiomae import storage
from audiomae.artifacts import releases
from audiomae.errors import IntegrityError

T = TypeVar("T")


class VersionCache(Generic[T]):
    """The last `keep` opened versions of something expensive; each is opened once, whatever the number of callers.

    Two are kept, so that during a swap requests that began on the old release end on it.
    """

    def __init__(self, opener: Callable[[str], T], keep: int = 2) -> None:
        self._opener, self._keep = opener, keep
        self._opened: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, version: str) -> T:
        """The opened `version`; opening errors are the opener's and leave the cache as it was."""
        opened = self._opened.get(version)
        if opened is not None:
            return opened
        with self._lock:
            if version not in self._opened:
                self._opened[version] = self._opener(version)
                while len(self._opened) > self._keep:
                    self._opened.popitem(last=False)
            return self._opened[version]


class SharedVersion:
    """The version chosen by the last reload, in the cluster's key-value store.

    It outlives every replica, so one that starts later (autoscaling, a crash, a deployment of a changed config) serves
    what its siblings serve. The choice holds for one index and one configured version in one run of Serve: who deploys
    another of either means that one, and who shuts Serve down starts afresh.

    Args:
        index: where the releases are.
        configured: the version in the arguments, a name or "latest".
        initial: what `configured` means when the application is built.
        instance: the run of Serve.
    """

    def __init__(self, index: str, configured: str, initial: str, instance: str) -> None:
        self._key = f"audiomae-serve-version/{storage.sha256_bytes(f'{index} {configured} {instance}'.encode())}"
        self._initial = initial

    def get(self) -> str:
        """The version to serve now."""
        stored = internal_kv._internal_kv_get(self._key)
        return stored.decode() if stored else self._initial

    def set(self, version: str) -> None:
        """Choose `version` for all replicas."""
        internal_kv._internal_kv_put(self._key, version.encode(), overwrite=True)


def mismatch(release: releases.Release, fingerprint: str) -> IntegrityError:
    """The error of a release whose encoder has this `fingerprint`, which is not the one of its vectors."""
    return IntegrityError(
        f"release {release.version}: its encoder has fingerprint {fingerprint}, but the index holds vectors of "
        f"{release.fingerprint}; publish the release again with the encoder that embedded it"
    )
