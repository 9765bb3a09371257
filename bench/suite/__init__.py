"""The benchmark suite: peers side by side in one process, in rounds of shuffled order.

One concept per file: what a run may cost (``plan``), how it is timed (``timing``) and how its
memory is read (``memory``), the matrices it works on (``matrices``), one module per section of
the page (``steps``, ``shapes``, ``training``, ``sketches``, ``targets``), what was asked for and
what was measured (``summary``), and how it is shown (``page``, ``plots``).
"""
