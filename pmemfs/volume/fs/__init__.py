"""Mode `fs`: a file system whose blocks are pages of the pool."""
