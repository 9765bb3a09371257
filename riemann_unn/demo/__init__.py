"""The demos on real data: ``python -m riemann_unn.demo --help`` lists them.

``__main__`` reads the command line (``cli``), runs an ``experiment``, prints its table and draws
its picture. ``memory``, ``conv``, ``convrnn``, ``lipschitz``, ``warmstart``, ``rescale`` and
``lowrank`` are the experiments, each with its ``_plots``. ``tasks``, ``images``, ``sequences`` and
``data`` provide the data, ``models`` and ``conv_models`` the networks; ``training`` trains,
``checkpoint`` saves, and ``progress`` shows the progress of a run.
"""
