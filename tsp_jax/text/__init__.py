"""From the files of a corpus to token ids in shards on disk."""
