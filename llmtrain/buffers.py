"""How large DeepSpeed's buffers are made, in elements: its defaults suit models of billions."""

MOST_BUCKET = 500_000_000  # DeepSpeed's own: beyond, a larger message is no faster
BUCKET_UNIT = 1024
MOST_PREFETCHED = 50_000_000
MOST_PERSISTENT = 100_000  # a parameter below is kept whole: gathering it takes longer than its use
MOST_GATHERED = 1_000_000_000
SWAPPED_GROUP = 100_000_000  # a part of the optimizer that is read from disk, stepped, written


def bucket_elements(num_trainable: int) -> int:
    """Gradients that are reduced in one message: all of them, where they are few."""
    return min(MOST_BUCKET, -(-num_trainable // BUCKET_UNIT) * BUCKET_UNIT)
