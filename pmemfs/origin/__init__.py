"""What a cache stands before: a file, a block device, an NBD export, an image of Ceph."""
