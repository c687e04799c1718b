"""One thread, no network and a cache of its own, for the tests and for the processes they start."""

import os
import tempfile

# Before torch is imported: sums over other numbers of threads differ in their last bit, and byte-identity is tested.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RLHF_CACHE"] = tempfile.mkdtemp(prefix="rlhf-tests-")
