"""The benchmark suite: peers side by side in one process, in rounds of shuffled order.

One concept per file: the budget of a run (``plan``), timing (``timing``), memory (``memory``), the
matrices (``matrices``), one module per section of the page (``steps``, ``shapes``, ``training``,
``sketches``, ``targets``), bounds and measured ratios (``summary``), and output (``page``,
``plots``).
"""
