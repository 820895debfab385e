"""Random calls of `sparse_attention` against an independent oracle in float64.

A case is made by its seed and its number alone. `patterns.py` draws the patterns and defines
them a second time, `mods.py` the score modifications, `cases.py` the rest of a call and its
tensors, `oracle.py` says what is right, and `run.py` runs a case on a backend and compares.
`python -m tests.campaign --help` runs many; `tests/test_campaign.py` runs some hundred.
"""
