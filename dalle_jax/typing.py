"""Type aliases shared by all subpackages."""

from typing import Any

import numpy as np

Params = dict[str, Any]  # nested dict of arrays, one leaf per parameter
Batch = dict[str, Any]  # name of an input -> array with one row per example
HostBatch = dict[str, np.ndarray]  # a batch in host memory
