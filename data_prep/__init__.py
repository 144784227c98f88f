"""Images in, certified shards out."""
