"""Text on its way to a batch of token ids; each module takes the last one's product.

    catalogue    what others published: one YAML each                names, sizes, licences
    download     theirs onto this disk, whole                       a folder, a record of it
    source/*     where documents come from: one module a kind       documents with an id
    corpus       what every kind shares, as the config group ``data``
    split        which documents are held out: a hash of the id     train, held_out
    tokenizer    a byte-level BPE trained here, or one that exists  a folder transformers opens
    shards       every document tokenised once                      memory-mapped ids, a manifest
    order        which sequences make up step n: a pure function    indices, whatever the ranks
    sequences    those sequences                                    input_ids_BL, labels_BL

Everything up to ``shards`` runs in one process before any rank starts; ranks need the manifest's
folder alone. ``cache`` makes each cached folder once, whole or not at all.
"""
