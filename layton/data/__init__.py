"""Images in, batches out: sources, mixing, exact resume and caches.

Import from the modules: `types` (what a sample is, splits), `images` and `geometry` (safe opening, fitting to a square
and back), `transforms`, `sources` and `shards` and `folder` (Scenes, tar shards, folders), `mixing`, `sampler` and
`loader` (order and resume), `module` (Lightning), `cache` (precomputed tensors).
"""
