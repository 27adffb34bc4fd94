"""Writes names and shapes of the published Transformers, as their reference implementations make them.

    PYTHONPATH=path/to/minDALL-E:path/to/LlamaGen python tests/golden/published_transformers.py

Needs what the *_reference.py files beside it need.
"""

import gzip
import json
from pathlib import Path

import llamagen_reference
import llamagen_t2i_reference
import mindalle_reference
import rudalle_reference

if __name__ == "__main__":
    found = {}
    for reference in (llamagen_reference, llamagen_t2i_reference, mindalle_reference, rudalle_reference):
        found |= reference.published()
    data = gzip.compress(json.dumps(found, separators=(",", ":")).encode(), mtime=0)
    (Path(__file__).parent / "published_transformers.json.gz").write_bytes(data)
