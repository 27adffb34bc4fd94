"""Type aliases that every room shares."""

from typing import Any

import numpy as np

Params = dict[str, Any]  # nested dict of arrays, one leaf per parameter
Batch = dict[str, Any]  # name of an input -> array with a row for each example
HostBatch = dict[str, np.ndarray]  # the same in the memory of the host
