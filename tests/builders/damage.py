"""Ways to damage a file."""


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {"a bit flipped": flip_bit, "truncated": truncate, "deleted": lambda path: path.unlink()}
