"""No test talks to the network: set before any library reads it, also where pytest is started without make."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
