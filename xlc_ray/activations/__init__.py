"""A language model's activations as data: named sites, text windows, harvesting, chunk files, the order of batches.

sites.py      "mlp_in.3" → the module of a model family        text.py   documents → token windows → chunk plan
harvest.py    nnsight forward → {site: tensor}                  order.py  (seed, position) → which stored rows
store.py      the chunk directory: write, resume, open, read    source.py windows and batches of stored rows
chunkfile.py  bytes of one chunk                                manifest.py  what a store knows about itself
windows.py    token windows, rows of a chunk                   foreign.py  stores that crosslayer-coding wrote
"""
