"""All handlers of one volume, over the same open files."""

from __future__ import annotations

from pmemfs.dataplane.held import OpenPlaces
from pmemfs.engine.base import Engine
from pmemfs.engine.trimming import Trimmer
from pmemfs.fuse.handlers.attributes import AttributeHandlers
from pmemfs.fuse.handlers.directories import DirectoryHandlers
from pmemfs.fuse.handlers.ioctls import IoctlHandlers
from pmemfs.fuse.handlers.names import NameHandlers
from pmemfs.fuse.handlers.notifications import Notifier
from pmemfs.fuse.handlers.openfiles import OpenFiles
from pmemfs.fuse.handlers.patience import Patience
from pmemfs.fuse.handlers.ranges import RangeHandlers
from pmemfs.fuse.handlers.xattrs import XattrHandlers
from pmemfs.fuse.published import PublishedAttributes, Publisher
from pmemfs.volume.base import Volume


class Handlers:
    """The handlers of one volume. `publisher` and `published` are for a data plane, if there is
    one; `opens` may be what an earlier process has left."""

    def __init__(
        self, volume: Volume, engine: Engine, trimmer: Trimmer, *,
        publisher: Publisher | None = None, published: PublishedAttributes | None = None,
        cached: bool = False, opens: OpenPlaces | None = None,
    ) -> None:  # fmt: skip
        opens = OpenPlaces.of_this_process() if opens is None else opens
        self.volume = volume
        self.patience = Patience(volume, trimmer.find_room)
        self.notifier = Notifier()
        self.names = NameHandlers(volume, published)
        self.files = OpenFiles(
            volume, engine, publisher, self.names, self.notifier, opens, cached=cached
        )
        self.attributes = AttributeHandlers(volume, self.files, published)
        self.xattrs = XattrHandlers(volume, self.files)
        self.directories = DirectoryHandlers(volume, opens)
        self.ranges = RangeHandlers(volume, self.files)
        self.ioctls = IoctlHandlers(volume, self.files, trimmer)
