"""Speed and memory of sparse_attn beside its peers: `python -m benchmarks`.

`rows` says what is compared, `contenders` how each computes it, `inputs` on what, and `oracle`
what is right. `worker` is the process that runs one job, `turns` lets the workers of a row take
turns, and `report` writes the tables and plots.
"""
