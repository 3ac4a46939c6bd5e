"""A hundred mistakes that a user may make, and what the program says of each.

Lines are written for `pmemfs`, as users of mkfs, mount, ndctl, zpool and fio would try them. Names
in braces are files, directories and mounts of the `Scene`. The words are those of the sentence that
name what is wrong, and what to do.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """A command line, the exit code it ends with, and words of its sentence."""

    line: str
    code: int
    words: tuple[str, ...]


def _mistake(line: str, code: int, *words: str) -> Mistake:
    return Mistake(line, code, words)


SIZES = [
    _mistake("create {new}", 1, "no such file", "--size says how large"),
    _mistake("create {new} --size 0", 2, "'0' is not a size", "zero"),
    _mistake("create {new} --size=-4G", 2, "'-4G' is not a size", "K, M, G, T or P"),
    _mistake("create {new} --size 4X", 2, "'4X' is not a size", "K, M, G, T or P"),
    _mistake("create {new} --size '4 gigs'", 2, "is not a size", "K, M, G, T or P"),
    _mistake("create {new} --size 50%", 2, "'50%' is not a size"),
    _mistake("create {new} --size 4K", 2, "too small", "at least"),
    _mistake("create {new} --size 8192P", 2, "it is not less than 8192P"),
    _mistake("create {new} --size 1000T", 1, "no room for", "free"),
    _mistake("create {tmpfs}/pool --size 64M", 1, "no room for", "free"),
    _mistake("create {clean} --size 8M --force", 2, "--size can make it larger, not smaller"),
    _mistake("create {new} --size 16M --page-size 3M", 2, "'3M' is none of 4K, 2M, 1G"),
    _mistake("create {new} --size 16M --page-size 1G", 2, "too small", "at least"),
    _mistake("create {new} --size 16M --align 3M", 2, "power of two"),
    _mistake("create {new} --size 16M --align 1K", 2, "power of two"),
    _mistake("create {new} 16M", 2, "there is no place for '16M'", "usage: pmemfs create"),
    _mistake("resize {clean}", 2, "give the new size with --size"),
    _mistake("resize {clean} --size 8M", 3, "can only grow"),
    _mistake("resize {mounted} --size 8M", 3, "can only grow"),
    _mistake("resize {clean} --size +16M", 2, "'+16M' is not a size"),
]

PLACES = [
    _mistake("create {clean} --size 16M", 3, "already holds the pmemfs pool", "--force"),
    _mistake("create {text}", 3, "already holds data", "--force"),
    _mistake("create {mounted}", 16, "mounted on {at}", "unmount it first"),
    _mistake("create {directory} --size 16M", 1, "directory"),
    _mistake("create /dev/null", 1, "character device"),
    _mistake("create {missing}/pool --size 16M", 1, "there is no directory", "make it first"),
    _mistake("create {text}/pool --size 16M", 1, "there is no directory"),
    _mistake("create {loop} --size 16M", 1, "symbolic link that leads to no file", "name the file"),
    _mistake("create {directory}/{long} --size 16M --name p", 1, "name too long"),
    _mistake("create {new} --size 16M --name a/b", 2, "cannot name a pool"),
    _mistake("create /dev/pmem77 --size 16M", 1, "/dev/pmem77", "no such device"),
    _mistake("create {new} --size 16M --mode filesystem", 2, "did you mean 'fs'"),
    _mistake("create {new} --size 16M --scheme ondemand", 2, "did you mean 'on-demand'"),
    _mistake("create {new} --sizes 16M", 2, "did you mean '--size'"),
    _mistake("creat {new} --size 16M", 2, "did you mean 'create'"),
    _mistake("mkfs {new}", 2, "did you mean 'create'"),
]

MOUNTS = [
    _mistake("mount {missing} {mountpoint}", 32, "no such file", "pmemfs create"),
    _mistake("mount {text} {mountpoint}", 32, "no label", "pmemfs create {text}"),
    _mistake("mount {empty} {mountpoint}", 32, "smaller"),
    _mistake("mount {clean} {missing}", 32, "no such file or directory", "mkdir"),
    _mistake("mount {clean} {text}", 32, "not a directory"),
    _mistake("mount {clean} {at}", 32, "is mounted there", "unmount it first"),
    _mistake("mount {clean}", 2, "MOUNTPOINT is missing", "usage: pmemfs mount"),
    _mistake("mount {mountpoint} {clean}", 32, "a pool is a file or a device"),
    _mistake("mount {mounted} {mountpoint} -o ro", 32, "in use", "other options"),
    _mistake("mount {truncated} {mountpoint}", 32, "cut off", "16MiB", "backup"),
    _mistake("mount {newer} {mountpoint}", 32, "format", "use a newer pmemfs"),
    _mistake("mount {older} {mountpoint}", 32, "format version is 0"),
    _mistake("mount {damaged} {mountpoint}", 32, "no label", "pmemfs create {damaged}"),
    _mistake("mount {frozen}/pool {mountpoint}", 32, "read-only", "-o ro"),
    _mistake("mount {loop} {mountpoint}", 32, "symbolic link that leads to no file"),
    _mistake("mount {directory} {mountpoint}", 32, "directory"),
    _mistake("mount {clean} {mountpoint} -o readonly", 2, "did you mean 'ro'"),
    _mistake("mount {clean} {mountpoint} -o mode=999", 2, "octal number, such as 600"),
    _mistake("mount {clean} {mountpoint} -o mode=fs", 2, "not an octal number"),
    _mistake("mount {clean} {mountpoint} -o uid=root", 2, "'root' is not a number", "id"),
    _mistake("mount {clean} {mountpoint} -o cached", 2, "no meaning in mode block", "leave it out"),
    _mistake("mount {clean} {mountpoint} -o loop", 2, "does not know it", "--help"),
    _mistake("mount {clean} {mountpoint} --transport rdma", 2, "none of auto, uring, fd"),
    _mistake("mount {clean} {mountpoint} --engine python -o engine=native", 2, "contradict"),
    _mistake("unmount {at}", 2, "did you mean 'umount'"),
    _mistake("umount {directory}", 32, "is not a pmemfs mount", "pmemfs list"),
    _mistake("umount {clean}", 32, "is not mounted", "pmemfs list"),
    _mistake("umount {missing}", 32, "no such path"),
    _mistake("umount {at} --force", 2, "no option --force", "pmemfs umount --help"),
    _mistake("umount {busy}", 32, "busy", "process", "umount --lazy"),
]

QUESTIONS = [
    _mistake("info {missing}", 1, "no such file"),
    _mistake("info {directory}", 1, "directory"),
    _mistake("info {text}", 4, "no label"),
    _mistake("info {newer}", 4, "format", "use a newer pmemfs"),
    _mistake("info {truncated}", 4, "cut off", "backup"),
    _mistake("info", 2, "TARGET is missing"),
    _mistake("list {at}", 2, "there is no place for"),
    _mistake("pages {clean}", 1, "is not mounted", "pmemfs mount"),
    _mistake("stat {directory}", 1, "is not a pmemfs mount"),
    _mistake("stat {at} 1", 2, "there is no place for"),
    _mistake("stat {at} --watch 0", 2, "is not from"),
    _mistake("stat {at} --count 3", 2, "give --watch"),
    _mistake("pages {at}/mounted", 1, "a file of the one on {at}", "name that"),
    _mistake("pages {at} --hottest 9999", 2, "is not from 0 to 1000"),
    _mistake("pages", 2, "TARGET is missing"),
    _mistake("pages {at} --by reads", 2, "give --map, too"),
    _mistake("pages {at} --watch", 2, "--watch is for a map"),
    _mistake("pages {at} --map --by inode", 2, "did you mean 'owner'"),
    _mistake("pages {at} --map --count 3", 2, "give --watch"),
    _mistake("pages {at} --map --colour always", 2, "did you mean '--color'"),
    _mistake("pages {at} --map --file {at}/none", 2, "give one of them"),
    _mistake("pages {at} --heatmap", 2, "did you mean '--map'"),
    _mistake("pages {at} --picture map.jpg", 2, "'map.jpg' ends in neither"),
    _mistake("pages {at} --file {text}", 1, "on another file system"),
    _mistake("pages {at} --file {at}", 1, "not a regular file"),
    _mistake("pages --file {at}/none", 1, "no such file"),
    _mistake("pages {at} --pins --map", 2, "give one of them"),
    _mistake("pages {at} --pin", 2, "did you mean '--pins'"),
    _mistake("pages {at} --pfn zero", 2, "'zero' is not a page-frame number", "0x200"),
    _mistake("pages {at} --pfn 0", 1, "page frame 0x0 is outside", "data is pfn 0x"),
    _mistake("extents {at}/none", 1, "no such file"),
    _mistake("extents {text}", 1, "on another file system"),
    _mistake("trim {directory}", 1, "is not a pmemfs mount"),
    _mistake("trim {at}", 1, "gives no memory back", "fstrim"),
    _mistake("check {mounted}", 8, "mounted on {at}", "unmount it first"),
    _mistake("check {at}", 8, "mounted on {at}", "unmount it"),
    _mistake("check {missing}", 8, "no such file"),
    _mistake("check {clean} --force", 2, "without --repair"),
    _mistake("check {clean} --repair --dry-run", 2, "give one of them"),
    _mistake("fsck {clean}", 2, "did you mean 'check'"),
    _mistake("destroy {clean}", 2, "remove the file with 'rm'"),
    _mistake("list --jsn", 2, "did you mean '--json'"),
    _mistake("", 2, "a command is missing", "pmemfs --help"),
]

COMPARISONS = [
    _mistake("compare --medium {missing}", 2, "is not a directory", "such as /dev/shm"),
    _mistake("compare --medium ''", 2, "'' is not a directory"),
    _mistake("compare --medium {tmpfs} --size 64M", 1, "no room for", "give a smaller --size"),
    _mistake("compare --size 8M", 2, "the pools need 32MiB each"),
    _mistake("compare --rounds 0", 2, "is not from 1 to 1000"),
    _mistake("compare --seconds soon", 2, "'soon' is not a number of seconds"),
    _mistake("compare --seconds 0", 2, "0 is not from 0.05 to 600"),
    _mistake("compare --size 64M --device {missing}", 1, "cannot read", "no such file"),
    _mistake("compare --size 64M --device {empty}", 1, "it has 0B, and 16MiB are read"),
    _mistake("compare --size 64M --report {missing}/r.html", 2, "no directory", "make it first"),
    _mistake(
        "compare --size 64M --report r.pdf", 2, "writes HTML", "'r.pdf' does not end in .html"
    ),
    _mistake("compare --size 64M --report {directory}", 2, "is no file", "such as r.html"),
    _mistake("compare {clean}", 2, "there is no place for"),
    _mistake("benchmark", 2, "did you mean 'compare'"),
]

COPIES = [
    _mistake("copy {text}", 2, "DST is missing", "usage: pmemfs copy"),
    _mistake("copy {text} ''", 2, "DST is empty"),
    _mistake("copy {text} {directory}", 1, "neither of them is in a mount", "cp"),
    _mistake("copy {missing} {at}", 1, "{missing}: no such file"),
    _mistake("copy {directory} {at}", 1, "{directory}: is a directory"),
    _mistake("copy /dev/zero {at}", 2, "neither a file nor a block device", "dd"),
    _mistake("copy {text} {at}/new", 1, "{at} is a mount of mode block", "only file is mounted"),
    _mistake("copy {at}/mounted {at}/mounted", 1, "they are the same file"),
    _mistake("copy {at}/mounted {missing}/a", 1, "{missing}: no such file"),
    _mistake("copy {at}/mounted {directory}/{long}", 1, "name too long"),
    _mistake("copy {at}/mounted {loop}", 1, "symbolic link that leads to no file"),
    _mistake("copy {at}/mounted /dev/pmem77", 1, "/dev/pmem77", "no such device"),
    _mistake("copy {at}/mounted {directory} -r", 2, "no option -r", "pmemfs copy --help"),
    _mistake("copy --dirct {text} {at}", 2, "did you mean '--direct'"),
    _mistake("cp {text} {at}", 2, "did you mean 'copy'"),
]

MISTAKES = SIZES + PLACES + MOUNTS + QUESTIONS + COMPARISONS + COPIES
